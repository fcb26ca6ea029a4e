"""The trainer against plain PyTorch: collation, token weighting, guards, checkpoints, resumption."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GemmaConfig, GemmaForCausalLM

from gemma_tune.data.encode import Datasets
from gemma_tune.data.encoded import IGNORED, EncodedRow
from gemma_tune.engines.base import LoadedModel
from gemma_tune.engines.precision import Precision
from gemma_tune.engines.transformers_engine import TransformersEngine
from gemma_tune.errors import RunError, TrainingStopped
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import read_metrics, start_manifest
from gemma_tune.runs.reporter import SilentReporter
from gemma_tune.training.checkpoint import SEAL, last_complete_checkpoint
from gemma_tune.training.run import TrainingResult, train_adapter
from gemma_tune.training.trainer import PadRight
from tests.training.random_rows import VOCAB, Rows, make_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    path = tmp_path_factory.mktemp("base")
    GemmaForCausalLM(config).save_pretrained(path)
    return path


def recipe_of(**training: Any) -> Recipe:
    defaults = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 6, "gradient_checkpointing": "off"}
    return Recipe.model_validate(
        {
            "model": {"load_in_4bit": False},
            "lora": {"rank": 4, "dropout": training.pop("dropout", 0.0)},
            "data": {"source": "x", "max_seq_tokens": 64},
            "evaluation": {"every_steps": training.pop("eval_every", None)},
            "training": {**defaults, **training},
        }
    )


def attach(base: Path, recipe: Recipe) -> LoadedModel:
    engine = TransformersEngine()
    precision = Precision("float32", "float32", None, "test")
    loaded = engine.load(base, section=recipe.model, precision=precision, max_seq_tokens=64)
    return engine.attach_lora(loaded, section=recipe.lora, gradient_checkpointing="off", seed=0).loaded


def train(
    base: Path,
    directory: Path,
    *,
    rows: Rows,
    recipe: Recipe,
    loaded: LoadedModel | None = None,
    resume_from: Path | None = None,
) -> tuple[RunDir, TrainingResult]:
    directory.mkdir(exist_ok=True)
    run = RunDir(directory)
    if resume_from is None:
        start_manifest(run)
    datasets: Datasets = rows  # type: ignore[assignment]
    result = train_adapter(
        loaded or attach(base, recipe),
        engine=TransformersEngine(),
        tokenizer=load_tokenizer(TINY_MODEL_DIR),
        datasets=datasets,
        recipe=recipe,
        run=run,
        reporter=SilentReporter(),
        base_name="somebody/some-gemma",
        base_revision="abc",
        resume_from=resume_from,
    )
    return run, result


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def reference_loss(model: torch.nn.Module, rows: Sequence[EncodedRow]) -> float:
    """Cross-entropy a supervised token, row by row, without batches, padding or the trainer."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
            targets = torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            count += int((targets != IGNORED).sum())
    return total / count


def test_padding_has_no_label_and_no_attention_even_when_pad_is_the_stop_token() -> None:
    rows = [
        (np.array([2, 7, 1], dtype=np.int32), np.array([False, True, True])),
        (np.array([2, 8, 9, 9, 1], dtype=np.int32), np.ones(5, dtype=np.bool_)),
    ]
    batch = PadRight(pad_token_id=1, pad_to_multiple_of=4)([[row] for row in rows])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"][0].tolist() == [IGNORED, 7, 1] + [IGNORED] * 5
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]


def test_eval_loss_is_weighted_by_token_whatever_the_batch_size(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(8, seed=1), make_rows(11, seed=2))
    expected = None
    for batch_size in (1, 4):
        recipe = recipe_of(max_steps=1, batch_size=batch_size)
        loaded = attach(base, recipe)
        expected = expected or reference_loss(loaded.model, rows.eval)
        _, result = train(base, tmp_path / f"{batch_size}", rows=rows, recipe=recipe, loaded=loaded)
        assert result.eval_loss_before == pytest.approx(expected, abs=1e-5)
        assert result.eval_loss_after == pytest.approx(reference_loss(loaded.model, rows.eval), abs=1e-5)


def test_the_reported_loss_is_that_of_plain_pytorch(base: Path, tmp_path: Path) -> None:
    rows = make_rows(4, seed=3)
    recipe = recipe_of(max_steps=1)
    expected = reference_loss(attach(base, recipe).model, rows)
    run, result = train(base, tmp_path / "r", rows=Rows(rows, []), recipe=recipe)
    assert losses(run)[0][1] == pytest.approx(expected, abs=1e-5)
    assert result.num_tokens == sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("dropout", [0.0])
def test_accumulation_equals_one_big_batch(base: Path, tmp_path: Path, dropout: float) -> None:
    """Rows of very different length: a mean of means would weight their tokens differently (F28)."""
    rows = Rows([*make_rows(6, seed=4, shortest=4, longest=5), *make_rows(6, seed=5, shortest=40, longest=50)], [])
    settings = {"max_steps": 3, "group_by_length": False, "dropout": dropout, "optimizer": "sgd", "learning_rate": 0.5}
    big, _ = train(base, tmp_path / "big", rows=rows, recipe=recipe_of(batch_size=4, **settings))
    many, _ = train(
        base, tmp_path / "many", rows=rows, recipe=recipe_of(batch_size=1, gradient_accumulation=4, **settings)
    )
    for (_, one), (_, other) in zip(losses(big), losses(many), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for name, weight in weights(big).items():
        torch.testing.assert_close(weights(many)[name], weight, rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(16, seed=6), [])
    first, second = (weights(train(base, tmp_path / n, rows=rows, recipe=recipe_of(dropout=0.1))[0]) for n in "ab")
    other = weights(train(base, tmp_path / "c", rows=rows, recipe=recipe_of(dropout=0.1, seed=1))[0])
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in first.items())


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1, "gradient_accumulation": 2, "group_by_length": False}])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Across the border of an epoch: 10 rows in batches of 4 make 3 steps, or 2 with accumulation."""
    rows = Rows(make_rows(10, seed=7), make_rows(4, seed=8))
    recipe = recipe_of(max_steps=8, save_every_steps=1, keep_checkpoints=8, eval_every=3, **settings)
    whole, _ = train(base, tmp_path / "whole", rows=rows, recipe=recipe)
    cut = RunDir(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    for step in range(6, 9):
        shutil.rmtree(cut.checkpoints / f"checkpoint-{step}")
    shutil.rmtree(cut.adapter)
    checkpoint, skipped = last_complete_checkpoint(cut)
    assert (checkpoint.name, skipped) == ("checkpoint-5", [])
    resumed, _ = train(base, cut.path, rows=rows, recipe=recipe, resume_from=checkpoint)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


def test_a_non_finite_gradient_stops_before_it_reaches_the_weights(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(8, seed=9), [])
    recipe = recipe_of(max_steps=6, save_every_steps=2)
    loaded = attach(base, recipe)
    calls = 0

    def poison(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls == 4 else output

    layer = loaded.model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(poison)
    with pytest.raises(TrainingStopped, match="step 4: the gradient is nan") as caught:
        train(base, tmp_path / "r", rows=rows, recipe=recipe, loaded=loaded)
    assert "training.learning_rate=" in (caught.value.hint or "")
    assert all(bool(torch.isfinite(weight).all()) for weight in loaded.model.parameters())
    assert last_complete_checkpoint(RunDir(tmp_path / "r"))[0].name == "checkpoint-2"


def test_a_nan_in_the_base_is_named(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of()
    loaded = attach(base, recipe)
    with torch.no_grad():
        loaded.model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = math.nan
    with pytest.raises(TrainingStopped) as caught:
        train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe, loaded=loaded)
    assert "layers.1.mlp.down_proj" in (caught.value.hint or "")
    assert losses(RunDir(tmp_path / "r")) == []


def test_damaged_checkpoints_are_passed_over_with_the_reason(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=5, save_every_steps=1, keep_checkpoints=5)
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe)
    (run.checkpoints / "checkpoint-5" / SEAL).unlink()
    (run.checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    scheduler = run.checkpoints / "checkpoint-3" / "scheduler.pt"
    content = bytearray(scheduler.read_bytes())
    content[len(content) // 2] ^= 1
    scheduler.write_bytes(content)
    with (run.checkpoints / "checkpoint-2" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    (run.checkpoints / "checkpoint-99").mkdir()
    path, skipped = last_complete_checkpoint(run)
    assert path.name == "checkpoint-1"
    assert [line.split(" is passed over: ")[0] for line in skipped] == [f"checkpoint-{n}" for n in (99, 5, 4, 3, 2)]
    assert "optimizer.pt is missing" in skipped[2]
    assert "scheduler.pt is not what was written" in skipped[3]
    shutil.rmtree(path)
    with pytest.raises(RunError, match="no complete checkpoint"):
        last_complete_checkpoint(run)


def test_rotation_keeps_the_newest(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=5, save_every_steps=1, keep_checkpoints=2)
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe)
    assert sorted(path.name for path in run.checkpoints.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_early_stop_keeps_the_best_adapter(base: Path, tmp_path: Path) -> None:
    """Random labels: the eval loss rises while the training loss falls, so the first evaluation stays the best."""
    rows = Rows(make_rows(8, seed=10), make_rows(8, seed=11))
    recipe = recipe_of(max_steps=60, eval_every=5, early_stop_patience=2, learning_rate=5e-2)
    loaded = attach(base, recipe)
    run, result = train(base, tmp_path / "r", rows=rows, recipe=recipe, loaded=loaded)
    evaluations = [row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row]
    assert result.steps < 60
    assert result.eval_loss_after == pytest.approx(min(evaluations), abs=1e-5)


def test_what_is_saved_names_its_base_and_no_path(base: Path, tmp_path: Path) -> None:
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe_of(max_steps=1))
    config = (run.adapter / "adapter_config.json").read_text(encoding="utf-8")
    assert '"base_model_name_or_path": "somebody/some-gemma"' in config
    assert '"revision": "abc"' in config
    assert str(base) not in config
    assert not any("embed_tokens" in name for name in weights(run))
