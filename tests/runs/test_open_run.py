"""Run directories: never overwritten, numbered, refused with nothing left behind."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gemma_tune.errors import RunError
from gemma_tune.runs.open_run import create_run, discard_run


def test_runs_are_numbered_from_the_highest(tmp_path: Path) -> None:
    names = [create_run(tmp_path, name=None, recipe_name="quick", needed_bytes=0).name for _ in range(2)]
    (tmp_path / "quick-041").mkdir()
    (tmp_path / "quick-other-900").mkdir()
    names.append(create_run(tmp_path, name=None, recipe_name="quick", needed_bytes=0).name)
    assert names == ["quick-001", "quick-002", "quick-042"]


def test_runs_that_start_together_get_different_directories(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(
            pool.map(lambda _: create_run(tmp_path, name=None, recipe_name="r", needed_bytes=0).name, range(24))
        )
    assert len(set(runs)) == 24


def test_a_used_name_is_refused(tmp_path: Path) -> None:
    run = create_run(tmp_path, name="mine", recipe_name="r", needed_bytes=0)
    (run.path / "keep").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="exists already"):
        create_run(tmp_path, name="mine", recipe_name="r", needed_bytes=0)
    assert (run.path / "keep").is_file()


@pytest.mark.parametrize("name", ["con", "NUL", "com1", "aux.txt"])
def test_windows_device_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="device"):
        create_run(tmp_path, name=name, recipe_name="r", needed_bytes=0)


def test_too_little_space_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the run needs 1,152,921,504\.61 GB, .* are free"):
        create_run(tmp_path / "new" / "runs", name="r", recipe_name="r", needed_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="cannot write to"):
        create_run(tmp_path / "runs", name="r", recipe_name="r", needed_bytes=0)


def test_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
    # Root writes everywhere, so a read-only mount stands in for the mode, or /proc where root may not mount.
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode:
        folder = Path("/proc/self")
    try:
        with pytest.raises(RunError, match="cannot write to"):
            create_run(folder / "runs", name=None, recipe_name="r", needed_bytes=0)
    finally:
        subprocess.run(["umount", tmp_path / "locked"], capture_output=True, check=False)


@pytest.mark.parametrize("users", [None, "notes.txt", ".recipe.yaml.old.tmp", "checkpoints"])
def test_discarding_removes_what_was_made_and_nothing_else(tmp_path: Path, users: str | None) -> None:
    run = create_run(tmp_path / "new" / "runs", name=None, recipe_name="r", needed_bytes=0)
    for name in filter(None, ("recipe.yaml", ".lock.json.77.tmp", "manifest.json", users)):
        (run.path / name).write_text("x", encoding="utf-8")
    assert discard_run(run)
    left = list(run.path.iterdir()) if users else list(tmp_path.iterdir())
    assert left == ([run.path / users] if users else [])
