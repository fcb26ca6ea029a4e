"""Trainings in two processes of this machine, which import the libraries once for all of them.

`run_together(tasks)` starts two of `python -m tests.training.two_processes`; each does every task with the other.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """One training of `random_rows`.

    Attributes:
        name: of the run below the output directory.
        num_rows: to train on; 5 more are evaluated.
        settings: as `recipe_of` takes them.
        resume: go on from this checkpoint of the run.
    """

    name: str
    num_rows: int
    settings: dict[str, Any]
    resume: str | None = None


def run_together(base: Path, output: Path, tasks: Sequence[Task]) -> None:
    """Do the tasks in two processes; the runs are those of process 0."""
    plan = output / "plan.json"
    plan.write_text(json.dumps([asdict(task) for task in tasks]), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.two_processes", str(base), str(output)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-6000:]


def main() -> None:
    from gemma_tune.machine.processes import end_process
    from gemma_tune.machine.world import process_group, world_of
    from tests.training.random_rows import Rows, make_rows
    from tests.training.small_runs import recipe_of, train

    base, output = map(Path, sys.argv[1:])
    world = world_of(os.environ)
    with process_group(world):
        for task in json.loads((output / "plan.json").read_text(encoding="utf-8")):
            rows = Rows(make_rows(task["num_rows"], seed=7), make_rows(5, seed=8))
            folder = output / task["name"]
            checkpoint = folder / "checkpoints" / task["resume"] if task["resume"] else None
            if not world.is_main:
                folder = output / "elsewhere"
                shutil.rmtree(folder, ignore_errors=True)
            train(base, folder, rows=rows, recipe=recipe_of(**task["settings"]), resume_from=checkpoint, world=world)
    end_process(0)


if __name__ == "__main__":
    main()
