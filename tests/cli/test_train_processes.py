"""`gemma-tune train --nproc 2` as a user meets it: killed, stopped, gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos import make_recipe_apart, outcome

pytestmark = pytest.mark.slow
NEVER_AUTO = "run.resume=never"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe_apart(tmp_path_factory.mktemp("recipe") / "recipe", engine="transformers")


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    starter = start(folder, recipe)
    assert starter.communicate(timeout=240)[0] is not None and starter.returncode == 0
    return folder


def start(folder: Path, recipe: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gemma_tune.cli.app", "train", str(recipe), "--nproc", "2", *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, pattern: str, starter: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


def test_a_process_killed_while_it_saves_ends_the_job_and_the_run_goes_on(
    recipe: Path, unbroken: Path, tmp_path: Path
) -> None:
    starter = start(tmp_path, recipe)
    wait_for(tmp_path, "runs/chaos/checkpoints/.checkpoint-6.partial", starter)
    (second,) = (child for child in psutil.Process(starter.pid).children() if child.environ()["RANK"] == "1")
    second.kill()
    began = time.monotonic()
    _, told = starter.communicate(timeout=60)
    assert starter.returncode == 1 and time.monotonic() - began < 60
    assert "process 1 was ended by SIGKILL (out of memory?), and the others ended with it" in " ".join(told.split())
    assert "resume with --resume" in told

    again = start(tmp_path, recipe)  # the recipe says run.resume: auto
    _, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert "resuming from checkpoint-" in told
    assert outcome(tmp_path) == outcome(unbroken)


def test_a_stop_saves_in_all_and_the_run_goes_on(recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    for number, step, arguments in ((signal.SIGTERM, 4, ()), (signal.SIGHUP, 10, ("--resume",))):
        starter = start(tmp_path, recipe, NEVER_AUTO, *arguments)
        wait_for(tmp_path, f"runs/chaos/checkpoints/checkpoint-{step}", starter)
        starter.send_signal(number)
        _, told = starter.communicate(timeout=120)
        assert starter.returncode == 75, told
        assert f"stopped by {number.name} after step" in told and "--nproc 2 --resume" in " ".join(told.split())

    alone = subprocess.run(
        [sys.executable, "-m", "gemma_tune.cli.app", "train", str(recipe)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 2 and "processes: 2 → 1" in alone.stderr

    again = start(tmp_path, recipe, NEVER_AUTO, "--resume")
    _, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert outcome(tmp_path) == outcome(unbroken)
