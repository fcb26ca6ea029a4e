"""Checkpoints of a training: what is saved brings back the run that would have been, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import RunError
from gemma_tune.runs.checkpoints import SEAL, last_complete_checkpoint, seal_checkpoint, step_of
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.training.state_file import read_state, write_state
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import attach, cut_after, recipe_of, require_equal_bits, train, weights


@pytest.mark.parametrize("resumed_at", [5, 6])  # within an epoch, and at the border of two
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.1, "gradient_accumulation": 2, "group_by_length": False},
        {"packing": True, "pack_tokens": 40, "neftune_alpha": 5.0, "batch_size": 1},
        {"early_stop_patience": 2, "eval_every": 1, "learning_rate": 0.2, "optimizer": "adafactor"},
        {"lora": {"use_dora": True, "modules_to_save": ["embed_tokens"]}, "optimizer": "adamw_fused"},
        {"log_every": 4, "schedule": "cosine", "optimizer": "sgd", "learning_rate": 0.5},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    base: Path, tmp_path: Path, settings: dict[str, Any], resumed_at: int
) -> None:
    """10 rows in batches of 4 make epochs of 3 steps, or of 2 with accumulation."""
    rows = Rows(make_rows(10, seed=7), make_rows(4, seed=8))
    recipe = recipe_of(**{"max_steps": 8, "save_every_steps": 1, "keep_checkpoints": 8, "eval_every": 3, **settings})
    whole, whole_result = train(base, tmp_path / "whole", rows=rows, recipe=recipe)
    cut = cut_after(whole, tmp_path / "cut", step=min(resumed_at, whole_result.steps))
    torch.manual_seed(123)  # what a new process has
    resumed, result = train(base, cut.path, rows=rows, recipe=recipe, resume_from=last_complete_checkpoint(cut)[0])
    require_equal_bits(resumed, whole)
    assert (result.steps, result.num_tokens) == (whole_result.steps, whole_result.num_tokens)
    assert (result.train_loss, result.eval_loss_after) == (whole_result.train_loss, whole_result.eval_loss_after)


def test_early_stop_keeps_the_best_adapter(base: Path, tmp_path: Path) -> None:
    """Random labels: the eval loss rises while the training loss falls, so the first evaluation stays the best."""
    rows = Rows(make_rows(8, seed=10), make_rows(8, seed=11))
    recipe = recipe_of(max_steps=60, eval_every=5, early_stop_patience=2, learning_rate=5e-2)
    loaded = attach(base, recipe)
    run, result = train(base, tmp_path / "r", rows=rows, recipe=recipe, loaded=loaded)
    evaluations = [row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row]
    assert result.steps < 60
    assert result.eval_loss_after == pytest.approx(min(evaluations), abs=1e-5)


def test_a_run_that_stopped_early_is_over(base: Path, tmp_path: Path) -> None:
    """Resumed after its last evaluation it makes no step more, and ends with the same best adapter."""
    rows = Rows(make_rows(8, seed=10), make_rows(8, seed=11))
    recipe = recipe_of(max_steps=60, eval_every=5, early_stop_patience=2, learning_rate=5e-2)
    run, result = train(base, tmp_path / "r", rows=rows, recipe=recipe)
    before, lines = weights(run), run.metrics.read_text(encoding="utf-8")
    assert result.steps < 60
    newest, _ = last_complete_checkpoint(run)
    assert step_of(newest) == result.steps
    _, again = train(base, run.path, rows=rows, recipe=recipe, resume_from=newest)
    assert again.steps == result.steps
    assert run.metrics.read_text(encoding="utf-8") == lines
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run).items())


def test_a_prolonged_run_takes_the_rates_of_its_new_length(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(10, seed=7), [])
    run, _ = train(base, tmp_path / "r", rows=rows, recipe=recipe_of(max_steps=2, save_every_steps=2))
    longer = recipe_of(max_steps=6, save_every_steps=2)
    train(base, run.path, rows=rows, recipe=longer, resume_from=run.checkpoints / "checkpoint-2")
    whole, _ = train(base, tmp_path / "whole", rows=rows, recipe=longer)
    rates = [[row["learning_rate"] for row in read_metrics(each)] for each in (run, whole)]
    assert rates[0][2:] == rates[1][2:]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_adapter_is_on_the_disk_before_it_bears_its_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fsync = RunDir(tmp_path / "run"), os.fsync
    synced: list[tuple[Path, bool]] = []

    def record(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), run.adapter.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    train(base, run.path, rows=Rows(make_rows(4, seed=1), []), recipe=recipe_of(max_steps=1))
    files = {path.name for path, has_name in synced if run.path == path.parent.parent and not has_name}
    assert files >= {path.name for path in run.adapter.iterdir()}
    assert (run.path, True) in synced


def test_a_trained_embedding_is_saved_once(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=1, lora={"modules_to_save": ["embed_tokens"]}, warmup_fraction=0.0)
    loaded = attach(base, recipe)
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe, loaded=loaded)
    saved = {name: weight for name, weight in weights(run).items() if "embed_tokens" in name}
    assert list(saved) == ["base_model.model.model.embed_tokens.weight"]
    trained = loaded.model.get_input_embeddings().modules_to_save["default"].weight
    assert torch.equal(*saved.values(), trained)


def test_a_state_of_another_format_is_refused(base: Path, tmp_path: Path) -> None:
    rows, recipe = Rows(make_rows(8, seed=9), []), recipe_of(max_steps=2, save_every_steps=1)
    run, _ = train(base, tmp_path / "r", rows=rows, recipe=recipe)
    newest, _ = last_complete_checkpoint(run)
    write_state(newest, "training", {**read_state(newest, "training"), "format": 99})
    seal_checkpoint(newest)
    with pytest.raises(RunError, match=r"checkpoint-2 was written by another version"):
        train(base, run.path, rows=rows, recipe=recipe, resume_from=newest)


def test_damaged_checkpoints_are_passed_over_with_the_reason(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=5, save_every_steps=1, keep_checkpoints=5)
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe)
    (run.checkpoints / "checkpoint-5" / SEAL).unlink()
    (run.checkpoints / "checkpoint-4" / "training.safetensors").unlink()
    state = run.checkpoints / "checkpoint-3" / "training.json"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with (run.checkpoints / "checkpoint-2" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    (run.checkpoints / "checkpoint-99").mkdir()
    path, skipped = last_complete_checkpoint(run)
    assert path.name == "checkpoint-1"
    assert [line.split(" is passed over: ")[0] for line in skipped] == [f"checkpoint-{n}" for n in (99, 5, 4, 3, 2)]
    assert "training.safetensors is missing" in skipped[2]
    assert "training.json is not what was written" in skipped[3]
    shutil.rmtree(path)
    with pytest.raises(RunError, match="no complete checkpoint"):
        last_complete_checkpoint(run)


def test_rotation_keeps_the_newest(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=5, save_every_steps=1, keep_checkpoints=2)
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe)
    assert sorted(path.name for path in run.checkpoints.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
