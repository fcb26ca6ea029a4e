"""Runs a program in several processes that are connected as torchrun connects them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BEGIN = """
import os
from gemma_tune.machine.world import process_group, explain_lost_processes, world_of
from gemma_tune.errors import GemmaTuneError, ProcessLost, RunError
world = world_of(os.environ)
with process_group(world):
"""


def run_in_each(body: str, *, size: int = 2) -> list[str]:
    """Run the body, which knows `world`, in each process; returns what each printed, errors and all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    program = _BEGIN + "".join(f"    {line}\n" for line in body.strip().splitlines())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    return [process.communicate(timeout=120)[0] for process in processes]
