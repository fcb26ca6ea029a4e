"""Recipes: strict in, every problem at once, YAML 1.2, frozen after."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gemma_tune.errors import RecipeError
from gemma_tune.recipe.load import MAX_RECIPE_BYTES, dump_recipe, load_recipe
from gemma_tune.recipe.schema import Recipe

MINIMAL = "data:\n  source: rows.jsonl\n  max_seq_tokens: 64\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return caught.value.message


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, MINIMAL))
    assert loaded.name == "mine"
    assert loaded.recipe.model.name == "gemma-tiny"
    assert loaded.recipe.lora.rank == 16


def test_a_length_is_never_assumed(tmp_path: Path) -> None:
    assert "data.max_seq_tokens: is required and missing" in refusal(tmp_path, "data:\n  source: rows.jsonl\n")


def test_every_problem_comes_in_one_message_with_its_line(tmp_path: Path) -> None:
    text = "model:\n  nmae: x\ntraining:\n  learning_rate: fast\n  batch_size: 0\n  optimizer: adma\n"
    text += "data:\n  max_seq_tokens: 1.5\n"
    message = refusal(tmp_path, text)
    path = tmp_path / "mine.yaml"
    assert message.startswith("6 problems")
    assert f"{path}:2: model.nmae: unknown key; did you mean 'name'?" in message
    assert f"{path}:4: training.learning_rate: must be a number above 0 and below 1, found 'fast'" in message
    assert f"{path}:5: training.batch_size: must be a whole number from 1 to 65536, found 0" in message
    assert f"{path}:6: training.optimizer: must be one of 'adamw'" in message
    assert f"{path}:7: data.source: is required and missing" in message
    assert f"{path}:8: data.max_seq_tokens: must be a whole number from 8 to 1048576, found 1.5" in message


def test_unknown_section_and_nested_unknown_key(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "trainnig:\n  epochs: 1\nlora:\n  alfa: 3\n")
    assert "trainnig: unknown section; did you mean 'training'?" in message
    assert "lora.alfa: unknown key; did you mean 'alpha'?" in message


@pytest.mark.parametrize(
    ("yaml", "expected"), [("2e-4", 2e-4), ("1E-3", 1e-3), ("0.0002", 2e-4), ("5.e-5", 5e-5), ("1.0e-05", 1e-5)]
)
def test_exponents_are_numbers(tmp_path: Path, yaml: str, expected: float) -> None:
    assert (
        load_recipe(write(tmp_path, MINIMAL + f"training: {{learning_rate: {yaml}}}\n")).recipe.training.learning_rate
        == expected
    )


def test_yaml_1_2_words(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + "training: {gradient_checkpointing: off, seed: 0123}\n")).recipe
    assert recipe.training.gradient_checkpointing == "off"
    assert recipe.training.seed == 123
    assert "must be true or false, found 'no'" in refusal(tmp_path, MINIMAL + "model: {load_in_4bit: no}\n")
    assert "must be a number above 0 and below 1, found '2e-4'" in refusal(
        tmp_path, MINIMAL + "training: {learning_rate: '2e-4'}\n"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: 1\ndata: 2\n", ":2: 'data' is given twice"),
        ("data:\n  source: a\n  source: b\n", ":3: 'source' is given twice"),
        ("data: [1\n", "not YAML"),
        ("- data\n", "found a list"),
        ("", "found nothing"),
        ("data: &a {source: x}\nmodel: *a\n", "anchors"),
        ("data: !!python/object/apply:os.system [id]\n", ":1: tags (!name) are not allowed"),
        ("data: {source: x, max_seq_tokens: 64, hf_token: abc}\n", "never holds a credential"),
        ("data: {source: hf_abcdefghij, max_seq_tokens: 64}\n", "never holds a credential"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe: .*quikstart.*did you mean 'quickstart'"):
        load_recipe(Path("quikstart"))
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"data:\n  source: caf\xe9.jsonl\n")
    with pytest.raises(RecipeError, match=r"latin.yaml:2: not UTF-8 \(byte 0xe9\)"):
        load_recipe(latin)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(big)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path).recipe.data.source == "rows.jsonl"


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora:\n")  # an empty section is a section of defaults
    recipe = load_recipe(
        path,
        ["training.max_steps=20", "lora.rank=4", "data.source=C:\\rows.jsonl", "lora.targets=[q_proj]", "run.name="],
    ).recipe
    assert (recipe.training.max_steps, recipe.lora.rank, recipe.lora.targets) == (20, 4, ("q_proj",))
    assert recipe.data.source == "C:\\rows.jsonl"
    assert recipe.run.name is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.max_stpes=3", "command line: training.max_stpes: unknown key; did you mean 'max_steps'?"),
        (
            "training.max_steps=many",
            "command line: training.max_steps: must be a whole number from 1 to 1000000000, found 'many'",
        ),
        ("max_steps=3", "cannot read the override"),
        ("training.max_steps", "cannot read the override"),
        ("data.source.path=3", "which is not a section"),
        ("data.source.0=1", "looks for '0' in a value which is not a section"),
        ("lora.learning_rate=1e-3", "lora.learning_rate: unknown key; write it as training.learning_rate"),
        ("lora.batch_size=2", "write it as training.batch_size or evaluation.batch_size"),
        ("training.num_train_epochs=2", "unknown key; here it is training.epochs"),
        ("data.mix=[{source: a, wieght: 1}]", "data.mix.0.wieght: unknown key; did you mean 'weight'?"),
        ("data.mix=[{source: a, weight: .inf}]", "data.mix.0.weight: must be a number above 0 and at most 1000000"),
        ("data.mix=[{source: 'https://ada:s3cretPassw0rd@x'}]", "data.mix.0.source: a recipe never holds a credential"),
        ("training.seed=4294967296", "must be a whole number from 0 to 4294967295, found 4294967296"),
        ("training.epochs=.inf", "training.epochs: must be a number above 0 and at most 1000000, found .inf"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, told: str) -> None:
    assert told in refusal(tmp_path, MINIMAL, override)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\n  mix: [{source: a, weight: 1}, {source: b, weight: 1}]\n  max_seq_tokens: 64\n")
    assert load_recipe(path, ["data.mix.1.weight=3"]).recipe.data.mix[1].weight == 3


def test_flat_keys_and_the_recipes_of_others(tmp_path: Path) -> None:
    assert "learning_rate: unknown section; write it as training.learning_rate" in refusal(
        tmp_path, MINIMAL + "learning_rate: 1e-3\n"
    )
    for trainer, text in {
        "Axolotl": "base_model: x\nmicro_batch_size: 2\ndatasets: [{path: a}]\n",
        "LLaMA-Factory": "model_name_or_path: x\nstage: sft\ncutoff_len: 9\n",
    }.items():
        assert f"is a configuration of {trainer}, not a recipe" in refusal(tmp_path, text)


def test_rows_are_not_a_recipe_and_are_not_repeated(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.csv"
    rows.write_text("name,phone\nAda Lovelace,0171 555\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="holds rows, and a recipe is expected") as caught:
        load_recipe(rows)
    assert caught.value.hint == f"gemma-tune init {rows} writes a recipe for them"
    for text in ("name,phone\nAda Lovelace,0171 555\n", "Ada Lovelace: 0171 555\n", "data: Ada Lovelace, 0171 555\n"):
        told = refusal(tmp_path, text)
        assert "Ada" not in told and "555" not in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (("model.load_in_8bit=true",), "in 4 bits or in 8, not both"),
        (("data.eval_source=a.jsonl", "data.eval_split=test"), "excludes data.eval_source"),
        (("training.early_stop_patience=2",), "needs an eval loss"),
        (("data.eval_fraction=0", "evaluation.every_steps=5"), "leaves no rows"),
        (("lora.init=pissa",), "needs them in 16 bits"),
        (("lora.targets=[all-linear, q_proj]",), "give it alone"),
        (("lora.targets=[q_proj, q_proj]",), "names a module twice"),
        (("lora.modules_to_save=[q_proj]",), "would be trained twice"),
        (("training.data_parallel=fsdp", "model.engine=unsloth"), "unsloth's kernels need whole weights"),
        (("training.data_parallel=fsdp", "model.load_in_8bit=true"), "int8 layers keep their scales apart"),
        (("training.data_parallel=fsdp", "training.optimizer=adamw_8bit"), "does not lie along the weights"),
        (("training.data_parallel=fsdp", "training.early_stop_patience=2"), "the best adapter is not put back"),
        (("training.data_parallel=zero2",), "found 'zero2'\n    fix: training.data_parallel=fsdp"),
        (("lora.targets=[]",), "must name at least one"),
        (("run.name=../x",), "must be 1 to 64"),
        (("run.name=.hidden",), "must be 1 to 64"),
    ],
)
def test_rules(tmp_path: Path, override: tuple[str, ...], told: str) -> None:
    assert told in refusal(tmp_path, MINIMAL, *override)


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL)).recipe
    with pytest.raises(ValidationError):
        recipe.training.epochs = 2  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    for name, section in Recipe.model_fields.items():
        for field, info in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert info.description and info.description.endswith("."), f"{name}.{field}"


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rank=st.integers(1, 1024),
    rate=st.floats(1e-9, 0.999, allow_nan=False),
    name=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).filter(
        lambda text: text.strip() and not text.startswith("hf_")
    ),
    columns=st.dictionaries(st.text("abc", min_size=1), st.text("xyz :#'\"", min_size=1), max_size=3),
)
def test_a_dumped_recipe_reads_back_equal(
    tmp_path: Path, rank: int, rate: float, name: str, columns: dict[str, str]
) -> None:
    recipe = Recipe.model_validate(
        {
            "data": {"source": name, "max_seq_tokens": 64, "columns": columns},
            "lora": {"rank": rank},
            "training": {"learning_rate": rate},
        }
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path).recipe == recipe
