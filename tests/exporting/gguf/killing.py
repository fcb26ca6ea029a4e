"""Kills a program that writes GGUF files at random moments, and looks at what it leaves."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def num_partials_left(
    program: str,
    source: Path,
    directory: Path,
    *,
    write: Callable[[Path], object],
    longest_seconds: float,
    num_kills: int = 5,
    seed: int = 7,
) -> int:
    """Run `program SOURCE OUTPUT`, which says `ready` and writes 1.gguf, 2.gguf and so on, and kill it; several times.

    After each kill every file that has its name must be as `write` writes it undisturbed, and `write` to the name that
    the killed one had begun must succeed at once and leave nothing else. Returns how often a file was unfinished.
    """
    write(directory / "whole.gguf")
    whole = (directory / "whole.gguf").read_bytes()
    output = directory / "out"
    generator = random.Random(seed)
    num_partials = 0
    for _ in range(num_kills):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", program, str(source), str(output)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(generator.uniform(0.02, longest_seconds))
            os.kill(process.pid, signal.SIGKILL)
        num_finished = len(list(output.glob("[0-9]*.gguf")))
        num_partials += any(path.stat().st_size for path in output.glob(".*.partial"))
        write(output / f"{num_finished + 1}.gguf")
        expected = [f"{number}.gguf" for number in range(1, num_finished + 2)]
        assert sorted(path.name for path in output.iterdir()) == sorted(expected)
        assert all(path.read_bytes() == whole for path in output.iterdir())
    return num_partials
