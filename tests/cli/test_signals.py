"""The signal harness in its short form; `benchmarks/signals.py` sends sixty, to nine commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_users_files_outlive_every_signal_and_the_same_command_ends() -> None:
    """Three commands by SIGKILL, and a training by SIGHUP."""
    killed = ["--trials", "3", "--commands", "train", "merge", "export"]
    for arguments in (killed, ["--signals", "HUP", "--trials", "2", "--commands", "train"]):
        done = subprocess.run(
            [sys.executable, "benchmarks/signals.py", "--seed", "1", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=580, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
