"""What the files of a base say of a recipe is refused by `validate` and `train` alike, first of all."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli.app import main
from gemma_tune.errors import ModelError
from gemma_tune.models.token_ids import ids_beyond, read_added_tokens, read_token_ids
from gemma_tune.paths import TINY_MODEL_DIR

NUM_ROWS = 2304
RECIPE = (
    "model: {name: base, engine: transformers}\n"
    "data: {source: tiny-world, max_seq_tokens: 256, max_train_rows: 16, max_eval_rows: 2}\n"
    "training: {max_steps: 1}\nevaluation: {exact_match: false, num_questions: 0}\nrun: {name: r}\n"
)
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(TINY_MODEL_DIR, tmp_path / "base")
    for path in (tmp_path / "base").iterdir():
        path.chmod(0o644)
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def told(command: str, *overrides: str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    sys.argv = ["gemma-tune", command, "r.yaml", *overrides]
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == code, printed.err
    return printed.err


def quantised(method: str, **more: Any) -> Edit:
    return lambda config: config.update(quantization_config={"quant_method": method, **more})


def add_token(tokenizer: dict[str, Any]) -> None:
    token = {"id": NUM_ROWS, "content": "<mood>", "special": False, "normalized": False}
    tokenizer["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})


CASES: dict[str, tuple[str, Edit | None, list[str], str]] = {
    "awq": ("config.json", quantised("awq", bits=4), [], "quantised by awq"),
    "fp8": ("config.json", quantised("fp8"), [], "quantised by fp8"),
    "no object": ("config.json", lambda config: config.update(quantization_config=[4]), [], "an object is expected"),
    "8 bits": ("config.json", quantised("bitsandbytes", load_in_8bit=True), [], "model.load_in_8bit is false"),
    "4 bits as 16": (
        "config.json", quantised("bitsandbytes", load_in_4bit=True), ["model.load_in_4bit=false"],
        "model.load_in_4bit is false",
    ),
    "4 bits merged": (
        "config.json", quantised("bitsandbytes", load_in_4bit=True), ["export.formats=[merged-16bit]"],
        "export.formats: merged-16bit: the base is quantised",
    ),
    "heads of another size": ("config.json", lambda config: config.update(head_dim=10**9), [], "shape [256, 256], and"),
    "more layers": ("config.json", lambda config: config.update(num_hidden_layers=5), [], "means 5 layers, and the"),
    "a wider MLP": ("config.json", lambda config: config.update(intermediate_size=513), [], "json means [513, 2"),
    "longer tokenizer": ("tokenizer.json", add_token, [], f"2305 tokens and the embedding {NUM_ROWS} rows; '<mood>'"),
    "other vocabulary": (
        "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update(zzzz=9000), [], "'zzzz' has id 9000",
    ),
    "no vocabulary": ("tokenizer.json", lambda tokenizer: tokenizer.pop("model"), [], "has no vocabulary with ids"),
    "smaller embedding": (
        "config.json", lambda config: config.update(vocab_size=NUM_ROWS + 64), [], "vocab_size in config.json is 2368",
    ),
    "tokens a gguf cannot say": (
        "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=None), ["export.formats=[gguf-q8_0]"],
        "export.formats: gguf-q8_0: ",
    ),
    "ollama, too": (
        "config.json", lambda config: config.update(attention_bias=True), ["export.formats=[ollama]"], "attention_bias",
    ),
    "unknown format": ("config.json", None, ["export.formats=[merged-61bit]"], "did you mean 'merged-16bit'"),
    "unknown module": ("config.json", None, ["lora.targets=[q_porj]"], "lora.targets: the model has no module"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_validate_and_train_refuse_alike(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, change, overrides, expected = CASES[case]
    if change is not None:
        edit(folder / "base" / name, change)
    message = told("validate", *overrides, code=2, capsys=capsys)
    assert expected in message
    assert told("train", *overrides, code=2, capsys=capsys).endswith(message)
    assert not (folder / "runs").exists()


def test_a_gguf_of_a_family_that_has_none_is_refused_without_its_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("model.name=gemma-4-e4b-it", "export.formats=[gguf-q8_0]")
    assert "only Gemma 1, Gemma 2, Gemma 3 can be written" in told("validate", *asked, code=2, capsys=capsys)


def test_that_a_quantised_base_cannot_be_merged_into_is_said_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "base" / "config.json", quantised("bitsandbytes", load_in_4bit=True))
    assert "gemma-tune merge RUN/adapter --base DIR" in told("validate", code=0, capsys=capsys)


def test_the_image_token_of_a_text_model_is_not_beyond_its_embedding(folder: Path) -> None:
    assert ids_beyond([("<image_soft_token>", 4), ("<mood>", 4), ("a", 3)], num_rows=4) == {"<mood>": 4}
    path = folder / "base" / "tokenizer.json"
    added = {token["content"]: token["id"] for token in read_added_tokens(path)}
    assert added and added.items() <= read_token_ids(path).items()
    path.write_text("{}", encoding="utf-8")
    assert read_added_tokens(path) == []
    with pytest.raises(ModelError, match="no vocabulary"):
        read_token_ids(path)


@pytest.mark.parametrize(
    "command",
    [
        "validate r.yaml data.template=chat",
        "train r.yaml data.template=chat data.source=chat.jsonl",
        "train r.yaml data.source=chat.jsonl",
        "data preview r.yaml data.source=chat.jsonl",
        "data audit r.yaml data.source=chat.jsonl",
        "generate base --template chat --prompt Hello",
        "score base --template chat --prompt Hello --response Hi",
    ],
)
def test_a_chat_template_that_fills_the_memory_is_refused_by_every_command(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "base/chat_template.jinja"
    path.write_text("{{ 'x' * 10000000000 }}" + path.read_text(encoding="utf-8"), encoding="utf-8")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gemma-tune", *command.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "base/chat_template.jinja) takes more than 512 MB of memory to render a conversation" in said


def test_a_chat_template_without_turn_ends_is_refused_by_validate(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "base/chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<end_of_turn>", "\n"), encoding="utf-8")
    assert "which is not a control token" in told("validate", "data.template=chat", code=2, capsys=capsys)
    told("validate", "data.template=dolly", code=0, capsys=capsys)
    assert "which is not a control token" in told("validate", code=2, capsys=capsys)  # `auto` finds dolly-chat
