"""The kill harness in its short form; `benchmarks/chaos.py` without arguments kills a hundred times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--kills", "4"],
        ["--kills", "3", "--engine", "unsloth", "--set", "training.packing=true", "--set", "training.batch_size=1"],
    ],
    ids=["transformers", "unsloth-packed"],
)
def test_killed_runs_end_as_the_unbroken_one(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", "--seed", "1", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the unbroken run bit for bit" in " ".join(done.stdout.split())
