"""What would fail after hours fails before the first step, and a rehearsal that passes changes nothing."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_tune.errors import RunError, TrainingStopped
from gemma_tune.runs import checkpoints as checkpoint
from gemma_tune.runs.layout import RunDir
from gemma_tune.training import dry_run as rehearsal
from gemma_tune.training.adapter_weights import trained_weights
from gemma_tune.training.loop import Loop
from gemma_tune.training.methods.sft import SftLoop
from gemma_tune.training.sampler import EpochSampler
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import attach, losses, recipe_of, train

ROWS = Rows(make_rows(8, seed=9), make_rows(4, seed=8))


def test_it_leaves_weights_gradients_random_state_and_folder_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(max_steps=1, dropout=0.5)
    loaded = attach(base, recipe)
    seen: dict[str, Any] = {}

    def rehearse(trainer: Loop, **arguments: Any) -> float | None:
        before = {name: weight.detach().clone() for name, weight in trained_weights(loaded.model).items()}
        random = torch.random.get_rng_state()
        loss = rehearsal.rehearse(trainer, **arguments)
        seen["weights"] = all(
            torch.equal(weight, before[name]) for name, weight in trained_weights(loaded.model).items()
        )
        seen["gradients"] = all(weight.grad is None for weight in trained_weights(loaded.model).values())
        seen["random"] = torch.equal(torch.random.get_rng_state(), random)
        seen["folder"] = not (tmp_path / "r" / ".rehearsal").exists()
        return loss

    monkeypatch.setattr("gemma_tune.training.train_adapter.rehearse", rehearse)
    _, result = train(base, tmp_path / "r", rows=ROWS, recipe=recipe, loaded=loaded)
    assert seen == {"weights": True, "gradients": True, "random": True, "folder": True}
    assert result.eval_loss_before is not None and result.num_tokens < 500


def test_the_longest_rows_come_first(base: Path) -> None:
    sampler = EpochSampler(ROWS.train.lengths, batch_size=3, seed=0, group_by_length=False)
    expected = np.sort(ROWS.train.lengths)[::-1][:3].tolist()
    assert [int(ROWS.train.lengths[row]) for (row,) in sampler.longest(3)] == expected


def test_too_little_memory_is_told_with_the_way_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute_loss(*arguments: Any, **keywords: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SftLoop, "compute_loss", compute_loss)
    with pytest.raises(TrainingStopped, match=r"too little memory for 4 of the longest sequences, \d+ tokens") as told:
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of())
    assert "halve training.batch_size" in (told.value.hint or "")
    assert losses_of(tmp_path / "r") == []


def test_a_save_that_does_not_come_back_is_told(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_wrong(model: Any, directory: Path) -> None:
        next(iter(trained_weights(model).values())).data.add_(1)

    monkeypatch.setattr(rehearsal, "read_adapter", read_wrong)
    with pytest.raises(RunError, match=r"does not come back as it was saved"):
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of())
    assert losses_of(tmp_path / "r") == []


@pytest.mark.parametrize(("call", "told"), [("rename", "cannot be renamed"), ("mkdir", "cannot be saved")])
def test_a_folder_that_takes_no_checkpoint_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, told: str
) -> None:
    """A file system that does not rename directories, and a quota."""
    real = getattr(Path, call)

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if ".rehearsal" in path.name:
            raise OSError(1, "Operation not permitted", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(RunError, match=f"{told}.*operation not permitted") as error:
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of())
    assert "set run.output_dir" in (error.value.hint or "") and losses_of(tmp_path / "r") == []


def test_room_for_the_checkpoints_is_asked_for_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100_000))
    with pytest.raises(RunError, match=r"3 checkpoints needs 0\.\d MB, 0\.1 MB are free"):
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of())


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return losses(RunDir(folder))
