"""Checkpoints on disk: whole or not listed, refused when damaged, never a pickle, never the last good one removed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gemma_tune import disk
from gemma_tune.errors import RunError
from gemma_tune.runs.checkpoints import (
    SEAL,
    go_back_to,
    last_complete_checkpoint,
    named_checkpoint,
    remove_old_checkpoints,
    seal_checkpoint,
    write_checkpoint,
)
from gemma_tune.runs.layout import RunDir
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import recipe_of, train, weights

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "complete.json",
    "process-0.json",
    "process-0.safetensors",
    "trainer_state.json",
    "training.json",
    "training.safetensors",
)
ROWS = Rows(make_rows(10, seed=7), [])
RECIPE = recipe_of(max_steps=4, save_every_steps=2)


class Canary:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def delete(file: Path, canary: Path) -> None:
    file.unlink()


def truncate(file: Path, canary: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def flip_a_bit(file: Path, canary: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps(Canary(canary)))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run, _ = train(base, tmp_path_factory.mktemp("trained") / "run", rows=ROWS, recipe=RECIPE)
    return run


@pytest.fixture
def run(trained: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(trained.path, tmp_path / "run")))


def test_a_checkpoint_holds_these_files_and_no_secret(run: RunDir) -> None:
    newest, _ = last_complete_checkpoint(run)
    assert sorted(file.name for file in newest.iterdir()) == sorted(FILES)
    content = b"".join(file.read_bytes() for file in newest.iterdir())
    assert b"hub_token" not in content
    assert str(run.path.parent).encode() not in content


@pytest.mark.parametrize("damage", [delete, truncate, flip_a_bit, replace_by_pickle])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_in_a_line(
    run: RunDir, tmp_path: Path, name: str, damage: Callable[[Path, Path], None]
) -> None:
    damage(run.checkpoints / "checkpoint-4" / name, tmp_path / "canary")
    found, skipped = last_complete_checkpoint(run)
    assert found.name == "checkpoint-2"
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint-4 is passed over: ")
    assert name in skipped[0] or name == SEAL
    with pytest.raises(RunError, match=r"checkpoint-4: ") as caught:
        named_checkpoint(run, 4)
    assert caught.value.hint == "complete ones: 2"
    assert go_back_to(run, found) == ["checkpoint-4"]
    assert (run.checkpoints / "set-aside" / "checkpoint-4").is_dir()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name not in (SEAL, "adapter_config.json")])
def test_a_pickle_under_a_right_seal_is_refused_and_never_runs(
    base: Path, run: RunDir, tmp_path: Path, name: str
) -> None:
    """Someone who can replace a file can seal it as well. (The adapter's configuration is not read on resume.)"""
    newest = run.checkpoints / "checkpoint-4"
    replace_by_pickle(newest / name, tmp_path / "canary")
    seal_checkpoint(newest)
    assert last_complete_checkpoint(run) == (newest, [])
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"checkpoint-4.* cannot be read"):
        train(base, run.path, rows=ROWS, recipe=recipe_of(max_steps=6, save_every_steps=2), resume_from=newest)
    assert not (tmp_path / "canary").exists()
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("planted", ["adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin"])
def test_a_planted_pickle_is_not_read(base: Path, run: RunDir, tmp_path: Path, planted: str) -> None:
    newest, _ = last_complete_checkpoint(run)
    replace_by_pickle(newest / planted, tmp_path / "canary")
    train(base, run.path, rows=ROWS, recipe=recipe_of(max_steps=5, save_every_steps=2), resume_from=newest)
    assert not (tmp_path / "canary").exists()


def test_unfinished_saves_and_removals_are_swept(run: RunDir) -> None:
    for name in (".checkpoint-6.partial", ".checkpoint-1.removed"):
        shutil.copytree(run.checkpoints / "checkpoint-2", run.checkpoints / name)
    newest, skipped = last_complete_checkpoint(run)
    assert (newest.name, skipped) == ("checkpoint-4", [])
    assert go_back_to(run, newest) == []
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def write_small(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x" * 1000)


def save_steps(run: RunDir, *steps: int) -> None:
    for step in steps:
        write_checkpoint(run, step=step, tensor_bytes=1000, write=write_small)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_rotation_counts_complete_ones_and_spares_the_protected(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_steps(run, 1, 2, 3, 4, 5)
    (run.checkpoints / "checkpoint-5" / SEAL).unlink()
    remove_old_checkpoints(run, keep=2, protected=[run.checkpoints / "checkpoint-1"])
    assert names(run) == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_the_best_and_the_resumed_one_outlive_the_rotation(base: Path, tmp_path: Path) -> None:
    """Random labels at a high rate: the eval loss only rises, so that the first evaluation is the best."""
    rows = Rows(make_rows(8, seed=10), make_rows(8, seed=11))
    settings = {
        "save_every_steps": 1,
        "keep_checkpoints": 2,
        "eval_every": 1,
        "learning_rate": 0.9,
        "warmup_fraction": 0.0,
    }
    run, _ = train(base, tmp_path / "r", rows=rows, recipe=recipe_of(max_steps=5, **settings))
    assert names(run) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    resumed = named_checkpoint(run, 4)
    shutil.rmtree(run.checkpoints / "checkpoint-5")
    train(base, run.path, rows=rows, recipe=recipe_of(max_steps=9, **settings), resume_from=resumed)
    assert names(run) == ["checkpoint-1", "checkpoint-4", "checkpoint-8", "checkpoint-9"]


def test_a_step_that_is_saved_again_sets_the_first_one_aside(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_steps(run, 1, 1, 1)
    assert names(run) == ["checkpoint-1", "set-aside"]
    aside = run.checkpoints / "set-aside"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-1", "checkpoint-1.2"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_steps(run, 1)
    with pytest.raises(RunError, match=r"checkpoint-2: it needs 1,125,899\.91 GB, .* are free"):
        write_checkpoint(run, step=2, tensor_bytes=1 << 50, write=write_small)
    assert names(run) == ["checkpoint-1"]


def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    save_steps(run, 1)

    def write_half(folder: Path) -> None:
        write_small(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"No space left on device; it needs 1\.0 MB, .* [GM]B were free"):
        write_checkpoint(run, step=2, tensor_bytes=1000, write=write_half)
    assert names(run) == ["checkpoint-1"]
    assert last_complete_checkpoint(run)[0].name == "checkpoint-1"
    monkeypatch.setattr(disk, "sync_file", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(RunError, match=r"checkpoint-2 could not be saved: I/O error"):
        save_steps(run, 2)
    assert names(run) == ["checkpoint-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_on_a_full_disk_stops_and_goes_on_after_space_is_made(
    base: Path, small_disk: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(max_steps=6, save_every_steps=2)
    whole, _ = train(base, tmp_path / "whole", rows=ROWS, recipe=recipe)
    run = RunDir(small_disk / "run")
    run.checkpoints.mkdir(parents=True)
    shutil.copytree(whole.checkpoints / "checkpoint-4", run.checkpoints / "checkpoint-4")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 900_000))
    with pytest.raises(RunError, match=r"checkpoint-6: it needs 1\.\d MB, 0\.\d MB are free"):
        train(base, run.path, rows=ROWS, recipe=recipe, resume_from=run.checkpoints / "checkpoint-4")
    assert last_complete_checkpoint(run) == (run.checkpoints / "checkpoint-4", [])
    ballast.unlink()
    train(base, run.path, rows=ROWS, recipe=recipe, resume_from=run.checkpoints / "checkpoint-4")
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(run).items())


def test_the_trained_adapter_is_on_the_disk_with_its_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, its directory, and, after the rename, the directory that lists it."""
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run, _ = train(base, tmp_path / "run", rows=ROWS, recipe=recipe_of(max_steps=1))
    partial = run.adapter.with_name(".adapter.partial")
    wanted = {str(partial / file.name) for file in run.adapter.iterdir() if file.is_file()} | {str(partial)}
    assert wanted <= set(synced)
    assert str(run.path) in synced[synced.index(str(partial)) :]
