"""The signal harness in its short form; `benchmarks/signals.py` without arguments sends sixty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_users_files_outlive_every_signal_and_the_same_command_ends() -> None:
    """Each of nine commands by SIGKILL, and two of them by SIGHUP."""
    for arguments in (["--trials", "9"], ["--signals", "HUP", "--trials", "4", "--commands", "train", "generate"]):
        done = subprocess.run(
            [sys.executable, "benchmarks/signals.py", "--seed", "1", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=580, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
