"""Which run of a recipe is the newest, which state it is in, and that two processes never train in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.errors import RunError
from gemma_tune.runs.index import find_begun, hold_run, interrupted_run, is_held, state_of
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import start_manifest, update_manifest
from gemma_tune.runs.open_run import create_run


def test_the_newest_run_of_a_recipe_is_resumed(tmp_path: Path) -> None:
    for _ in range(2):
        start_manifest(create_run(tmp_path, name=None, recipe_name="r", needed_bytes=0))
    create_run(tmp_path, name=None, recipe_name="r", needed_bytes=0)  # died before its manifest
    start_manifest(create_run(tmp_path, name=None, recipe_name="r-b", needed_bytes=0))
    assert find_begun(tmp_path, name=None, recipe_name="r").name == "r-002"
    with pytest.raises(RunError, match="nothing to resume"):
        find_begun(tmp_path, name=None, recipe_name="other")


def test_one_process_holds_a_run_until_it_dies(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    program = f"""
import time
from pathlib import Path
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.index import hold_run
with hold_run(RunDir(Path({str(tmp_path)!r}))):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert is_held(run)
    with pytest.raises(RunError, match=r"being trained by another process"), hold_run(run):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not is_held(run)
    with hold_run(run):
        assert is_held(run)


@pytest.mark.parametrize(
    ("status", "is_interrupted"), [("running", True), ("stopped", True), ("failed", True), ("finished", False)]
)
def test_what_counts_as_interrupted(tmp_path: Path, status: str, is_interrupted: bool) -> None:
    run = RunDir(tmp_path / "r-001")
    run.path.mkdir()
    assert interrupted_run(tmp_path, name=None, recipe_name="r") is None
    start_manifest(run)
    run.resolved_recipe.write_text("", encoding="utf-8")
    update_manifest(run, status=status)
    for name in (None, "r-001"):
        assert (interrupted_run(tmp_path, name=name, recipe_name="r") == run) == is_interrupted
    assert state_of(run) == ("dead" if status == "running" else status)
    with hold_run(run):
        assert state_of(run) == "running"
        assert interrupted_run(tmp_path, name=None, recipe_name="r") is None
