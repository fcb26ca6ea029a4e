"""Joined rows against each row alone in a plain transformers model, in both engines; the guard; whole runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig, PretrainedConfig

from gemma_tune.data.encode.arrays import IGNORED, EncodedRow, EncodedRows
from gemma_tune.engines.base import Engine, LoadedModel, LoadSettings
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.errors import DataError
from gemma_tune.machine.precision import Precision
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.checkpoints import last_complete_checkpoint
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import start_manifest
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import SilentReporter
from gemma_tune.training.layouts import JoinRows, RowGroups, join_rows_for
from gemma_tune.training.leak_probe import find_leak
from gemma_tune.training.sampler import EpochSampler
from gemma_tune.training.train_adapter import TrainingResult, train_adapter
from tests.training.random_rows import VOCAB, Rows, make_rows
from tests.training.small_runs import parts_of

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.3,  # at 0.02 attention hardly matters, and a leak would pass for rounding
}
# The window is shorter than most rows; Gemma 3 gets a layer of each kind.
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=32),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, sliding_window=8, query_pre_attn_scalar=32, layer_types=["sliding_attention", "full_attention"]
    ),
}
PACK_TOKENS = 64


ROWS = make_rows(12, seed=0)


class Warnings(SilentReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def recipe_of(**training: Any) -> Recipe:
    defaults = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 6, "gradient_checkpointing": "off"}
    return Recipe.model_validate(
        {
            "model": {"load_in_4bit": False},
            "lora": {"rank": 4, "dropout": training.pop("dropout", 0.0)},
            "data": {"source": "x", "max_seq_tokens": PACK_TOKENS},
            "evaluation": {"every_steps": training.pop("eval_every", None)},
            "training": {**defaults, "packing": True, **training},
        }
    )


def attach(base: Path, recipe: Recipe, *, engine: Engine | None = None) -> LoadedModel:
    engine = engine or TransformersEngine()
    precision = Precision("float32", "float32", None, "test")
    loaded = engine.load(base, LoadSettings(recipe.model, precision, max_seq_tokens=PACK_TOKENS))
    return engine.attach_lora(loaded, section=recipe.lora, gradient_checkpointing="off", seed=0).loaded


def train(
    base: Path,
    directory: Path,
    *,
    rows: Rows,
    recipe: Recipe,
    loaded: LoadedModel | None = None,
    engine: Engine | None = None,
    resume_from: Path | None = None,
) -> tuple[RunDir, TrainingResult, list[str]]:
    directory.mkdir(exist_ok=True)
    run, reporter = RunDir(directory), Warnings()
    if resume_from is None:
        start_manifest(run)
    loaded = loaded or attach(base, recipe, engine=engine)
    parts = parts_of(run, loaded, rows=rows, recipe=recipe, reporter=reporter, engine=engine)
    return run, train_adapter(parts, resume_from=resume_from), reporter.texts


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def supervised_loss(logits: torch.Tensor, row: EncodedRow) -> float:
    """Mean cross-entropy of a row's supervised tokens from its logits [tokens, vocabulary]."""
    targets = torch.tensor(row.labels[1:])
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), targets, ignore_index=IGNORED))


def losses_alone(base: Path, rows: Sequence[EncodedRow]) -> list[float]:
    """The oracle: transformers' own model, one row at a time, without padding, positions or adapter.

    In `eager`, which is the only one that caps the attention scores of Gemma 2.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [supervised_loss(model(input_ids=torch.tensor([row.input_ids])).logits[0], row) for row in rows]


def losses_joined(loaded: LoadedModel, rows: Sequence[EncodedRow], *, collate: JoinRows | None = None) -> list[float]:
    """The loss of each row where it stands in batches of two packs."""
    encoded = EncodedRows.from_rows(rows)
    packs = list(EpochSampler(encoded.lengths, batch_size=2, seed=0, group_by_length=True, pack_tokens=PACK_TOKENS))
    collate = collate or join_rows_for(loaded, pad_token_id=0)
    found: dict[int, float] = {}
    loaded.model.train()
    for start in range(0, len(packs), 2):
        sequences: list[Sequence[int]] = list(packs[start : start + 2])
        batch = collate([RowGroups(encoded)[pack] for pack in packs[start : start + 2]])
        if collate.in_one_sequence:
            sequences = [[row for pack in sequences for row in pack]]
        assert "attention_mask" not in batch
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_tokens")}
        with torch.no_grad():
            output = loaded.model(**inputs, use_cache=False)
        for logits, sequence in zip(output.logits, sequences, strict=True):
            first = 0
            for row in sequence:
                length = len(rows[row].input_ids)
                found[row] = supervised_loss(logits[first : first + length], rows[row])
                first += length
    return [found[row] for row in range(len(rows))]


def with_a_mask_of_ones(loaded: LoadedModel) -> LoadedModel:
    """A model that leaks: what a well-meaning wrapper or a library update may do."""

    def add_mask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        return args, kwargs

    loaded.model.register_forward_pre_hook(add_mask, with_kwargs=True)
    return loaded


def probe(loaded: LoadedModel, *, batch_size: int = 2) -> str | None:
    return find_leak(loaded, rows=EncodedRows.from_rows(ROWS), pad_token_id=0, batch_size=batch_size)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["gemma3_text"]


def test_the_head_is_given_each_supervised_token_and_what_predicts_it() -> None:
    rows = EncodedRows.from_rows(ROWS[:3])
    batch = JoinRows(pad_token_id=0, in_one_sequence=True, with_head_targets=True)([RowGroups(rows)[(0, 1, 2)]])
    kept, targets = batch["logits_to_keep"], batch["head_targets"]
    assert torch.equal(batch["input_ids"][0, kept + 1], targets)
    assert (
        len(targets)
        == int((batch["labels"] != IGNORED).sum())
        == sum(label != IGNORED for row in ROWS[:3] for label in row.labels[1:])
    )
    firsts = np.concatenate([[0], np.cumsum(rows.lengths)[:-1]])
    assert not set((kept + 1).tolist()) & set(firsts.tolist())  # no row predicts the start of the next


def test_a_joined_batch_restarts_positions_and_has_no_mask() -> None:
    def row(ids: list[int], *, supervised_from: int) -> Any:
        return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= supervised_from

    packs = [
        [row([2, 7, 8, 1], supervised_from=2), row([2, 9, 1], supervised_from=0)],
        [row([2, 5], supervised_from=1)],
    ]
    batch = JoinRows(pad_token_id=1)(packs)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 1, 2, 9, 1], [2, 5, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 1, -100, 9, 1], [-100, 5, -100, -100, -100, -100, -100]]
    assert batch["num_tokens"] == 9
    assert batch.keys() == {"input_ids", "position_ids", "labels", "num_tokens"}
    line = JoinRows(pad_token_id=1, pad_to_multiple_of=4, in_one_sequence=True, with_row_lengths=True)(packs)
    assert line["input_ids"].tolist() == [[2, 7, 8, 1, 2, 9, 1, 2, 5, 1, 1, 1]]
    assert line["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0, 0]]
    assert line["labels"].tolist() == [[-100, -100, 8, 1, -100, 9, 1, -100, 5, -100, -100, -100]]
    assert line["packed_seq_lengths"].tolist() == [4, 3, 2]
    assert line["num_tokens"] == 9


def test_rows_are_read_where_they_are() -> None:
    rows = EncodedRows.from_rows(ROWS)
    for ids, supervised in RowGroups(rows)[(3, 1)]:
        assert np.shares_memory(ids, rows.token_ids)
        assert np.shares_memory(supervised, rows.supervised)


@pytest.mark.parametrize(
    ("engine", "device", "attention", "in_one_sequence", "with_row_lengths"),
    [
        ("transformers", "cpu", "sdpa", False, False),
        ("unsloth", "cpu", "sdpa", False, False),
        ("transformers", "cuda", "sdpa", False, False),
        ("transformers", "cuda", "flash_attention_2", True, False),
        ("unsloth", "cuda", "sdpa", True, True),
    ],
)
def test_attention_that_reads_one_sequence_gets_one(
    engine: str, device: str, attention: str, in_one_sequence: bool, with_row_lengths: bool
) -> None:
    model = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(_attn_implementation=attention))
    loaded = LoadedModel(model, engine, Precision("float32", "float32", None, "test"), 0)
    found = join_rows_for(loaded, pad_token_id=0)
    assert (found.in_one_sequence, found.with_row_lengths) == (in_one_sequence, with_row_lengths)


LAYOUTS = {
    "sequence a pack": JoinRows(0),
    "padded to 8": JoinRows(0, pad_to_multiple_of=8),
    "one sequence": JoinRows(0, pad_to_multiple_of=8, in_one_sequence=True, with_row_lengths=True),
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_joined_rows_have_the_losses_of_each_alone(bases: dict[str, Path], name: str, layout: str) -> None:
    found = losses_joined(attach(bases[name], recipe_of()), ROWS, collate=LAYOUTS[layout])
    assert found == pytest.approx(losses_alone(bases[name], ROWS), abs=1e-4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_row_changes_no_other_rows_loss(bases: dict[str, Path], name: str) -> None:
    loaded = attach(bases[name], recipe_of())
    changed = make_rows(1, seed=99, shortest=len(ROWS[5].input_ids) - 1, longest=len(ROWS[5].input_ids) - 1)
    before, after = (losses_joined(loaded, rows) for rows in (ROWS, [*ROWS[:5], *changed, *ROWS[6:]]))
    assert [row for row in range(len(ROWS)) if before[row] != after[row]] == [5]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_probe_passes_sound_models_and_catches_a_leak(bases: dict[str, Path], name: str, batch_size: int) -> None:
    loaded = attach(bases[name], recipe_of())
    assert probe(loaded, batch_size=batch_size) is None
    assert "they see each other" in (probe(with_a_mask_of_ones(loaded), batch_size=batch_size) or "")


def test_the_probe_catches_wrong_positions(bases: dict[str, Path]) -> None:
    """Rows apart from each other, but not as they are alone."""
    loaded = attach(bases["gemma"], recipe_of())

    def stretch(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            positions = kwargs["position_ids"]
            kwargs["position_ids"] = positions + (positions > 12)
        return args, kwargs

    loaded.model.register_forward_pre_hook(stretch, with_kwargs=True)
    assert "differs from its loss alone" in (probe(loaded) or "")


def test_the_probe_leaves_everything_as_it_was(base: Path) -> None:
    loaded = attach(base, recipe_of(dropout=0.1))
    loaded.model.eval()
    next(module for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)).train()
    modes = [module.training for module in loaded.model.modules()]
    values = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    state = torch.get_rng_state()
    assert probe(loaded) is None
    assert [module.training for module in loaded.model.modules()] == modes
    assert all(torch.equal(weight, values[name]) for name, weight in loaded.model.named_parameters())
    assert trained[0].grad is not None
    assert torch.equal(trained[0].grad, torch.ones_like(trained[0]))
    assert all(weight.grad is None for weight in loaded.model.parameters() if weight is not trained[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_refuses_joined_rows_is_told_with_its_words(base: Path) -> None:
    loaded = attach(base, recipe_of())

    def refuse(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "position_ids" in kwargs:
            raise TypeError("forward() takes no position_ids")

    loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert probe(loaded) == "the model refuses joined rows (TypeError: forward() takes no position_ids)"


def test_a_leaking_model_is_trained_unpacked_and_says_so(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=2)
    loaded = with_a_mask_of_ones(attach(base, recipe))
    run, _, warnings = train(base, tmp_path / "leaking", rows=Rows(ROWS), recipe=recipe, loaded=loaded)
    assert len(warnings) == 1
    assert "training.packing is set aside" in warnings[0]
    assert "they see each other" in warnings[0]
    plain, _, none = train(base, tmp_path / "plain", rows=Rows(ROWS), recipe=recipe_of(max_steps=2, packing=False))
    assert none == []
    assert losses(run) == losses(plain)
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(run).items())


def test_an_epoch_of_packs_trains_every_token_once(base: Path, tmp_path: Path) -> None:
    rows = Rows(ROWS, make_rows(5, seed=3))
    num_packs = len(EpochSampler(rows.train.lengths, batch_size=2, seed=0, group_by_length=True, pack_tokens=64))
    recipe = recipe_of(max_steps=None, epochs=2)
    loaded = attach(base, recipe)
    run, result, warnings = train(base, tmp_path / "r", rows=rows, recipe=recipe, loaded=loaded)
    assert warnings == []
    assert result.steps == 2 * -(-num_packs // 2)
    assert result.num_tokens == 2 * sum(len(row.input_ids) for row in ROWS)
    assert read_metrics(run)[-1]["num_tokens"] == result.num_tokens
    counts = [sum(label != IGNORED for label in row.labels) for row in rows.eval]
    alone = np.average(losses_alone(base, list(rows.eval)), weights=counts)
    assert result.eval_loss_before == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("settings", [{"batch_size": 16}, {"batch_size": 1, "gradient_accumulation": 16}])
def test_a_step_of_packs_is_a_step_of_padded_rows(base: Path, tmp_path: Path, settings: dict[str, int]) -> None:
    """All rows in one step: the loss is weighted by token however they are joined, and so is the gradient."""
    common = {"max_steps": 2, "optimizer": "sgd", "learning_rate": 0.5}
    padded, _, _ = train(
        base, tmp_path / "padded", rows=Rows(ROWS), recipe=recipe_of(packing=False, batch_size=12, **common)
    )
    packed, _, warnings = train(base, tmp_path / "packed", rows=Rows(ROWS), recipe=recipe_of(**settings, **common))
    assert warnings == []
    for (_, one), (_, other) in zip(losses(padded), losses(packed), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for name, weight in weights(padded).items():
        torch.testing.assert_close(weights(packed)[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1, "gradient_accumulation": 2, "batch_size": 1}])
def test_a_resumed_packed_run_is_the_uninterrupted_one_bit_for_bit(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """In the middle of the second epoch, whose packs are other ones than those of the first."""
    rows = Rows(make_rows(24, seed=7), make_rows(4, seed=8))
    recipe = recipe_of(max_steps=8, save_every_steps=1, keep_checkpoints=8, eval_every=3, **settings)
    num_packs = len(EpochSampler(rows.train.lengths, batch_size=2, seed=0, group_by_length=True, pack_tokens=64))
    steps_an_epoch = -(-num_packs // 2)
    assert steps_an_epoch < 5 < 2 * steps_an_epoch
    whole, _, _ = train(base, tmp_path / "whole", rows=rows, recipe=recipe)
    cut = RunDir(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    for step in range(6, 9):
        shutil.rmtree(cut.checkpoints / f"checkpoint-{step}")
    shutil.rmtree(cut.adapter)
    checkpoint, _ = last_complete_checkpoint(cut)
    resumed, _, _ = train(base, cut.path, rows=rows, recipe=recipe, resume_from=checkpoint)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


def test_a_row_longer_than_a_pack_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than a pack of 16 tokens"):
        train(base, tmp_path / "r", rows=Rows(ROWS), recipe=recipe_of(pack_tokens=16))


@pytest.fixture(scope="module")
def under_unsloth(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `measure_unsloth` finds in a process of its own: one process takes one engine."""
    directory = tmp_path_factory.mktemp("unsloth")
    program = (
        "import gemma_tune.engines.unsloth, runpy\n"
        f"runpy.run_path({__file__!r}, run_name='under_unsloth')['measure_unsloth']()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory), json.dumps({name: str(path) for name, path in bases.items()})],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((directory / "found.json").read_text(encoding="utf-8"))


def measure_unsloth() -> None:
    """Run by `under_unsloth`; writes found.json into the directory of the first argument."""
    from gemma_tune.engines.unsloth import UnslothEngine

    directory, bases = Path(sys.argv[1]), json.loads(sys.argv[2])
    engine, found = UnslothEngine(), {}
    for name, base in bases.items():
        loaded = attach(Path(base), recipe_of(), engine=engine)
        joined = {layout: losses_joined(loaded, ROWS, collate=collate) for layout, collate in LAYOUTS.items()}
        sound = probe(loaded)
        rows = Rows(ROWS)
        _, result, warnings = train(
            Path(base), directory / name, rows=rows, recipe=recipe_of(max_steps=None), loaded=loaded, engine=engine
        )
        leak = probe(with_a_mask_of_ones(loaded))
        found[name] = {
            "joined": joined,
            "sound": sound,
            "leak": leak,
            "losses": losses(RunDir(directory / name)),
            "num_tokens": result.num_tokens,
            "warnings": warnings,
        }
    (directory / "found.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_unsloth_keeps_joined_rows_apart(
    bases: dict[str, Path], under_unsloth: dict[str, Any], tmp_path: Path, name: str
) -> None:
    found = under_unsloth[name]
    alone = losses_alone(bases[name], ROWS)
    assert found["joined"].keys() == LAYOUTS.keys()
    assert all(joined == pytest.approx(alone, abs=1e-4) for joined in found["joined"].values())
    assert found["sound"] is None
    assert "they see each other" in found["leak"]
    assert found["warnings"] == []
    assert found["num_tokens"] == sum(len(row.input_ids) for row in ROWS)
    run, _, _ = train(bases[name], tmp_path / "r", rows=Rows(ROWS), recipe=recipe_of(max_steps=None))
    assert found["losses"][0][1] == pytest.approx(losses(run)[0][1], abs=1e-4)
