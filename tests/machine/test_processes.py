"""The processes of `train --nproc`: what they are told, which signals reach them, and how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from gemma_tune.errors import EngineError
from gemma_tune.machine.processes import Nodes

ROOT = Path(__file__).resolve().parents[2]
# The starter in a process of its own, with a worker of ours in the place of gemma-tune.
_STARTER = """
import sys
from gemma_tune.machine import processes
from gemma_tune.machine.processes import Nodes, run_processes
from gemma_tune.errors import GemmaTuneError
processes.PROGRAM = (sys.executable, sys.argv[1])
processes._SECONDS_TO_END, processes._SECONDS_TO_OBEY = 1.0, 1.0
try:
    sys.exit(run_processes(["train", "x.yaml"], per_machine=2, nodes=Nodes(*eval(sys.argv[2]))))
except GemmaTuneError as error:
    print(error.message, file=sys.stderr)
    sys.exit(error.exit_code)
"""
_WORKER_BEGINS = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from gemma_tune.machine.processes import end_with_the_starter
rank = int(os.environ["RANK"])
end_with_the_starter()
"""


def start(tmp_path: Path, worker: str, machines: str = "()", *, starter: str = _STARTER) -> subprocess.Popen[str]:
    program = tmp_path / "worker.py"
    program.write_text(_WORKER_BEGINS.format(root=str(ROOT)) + textwrap.dedent(worker), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-c", starter, str(program), machines],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.02)


def test_each_process_knows_its_place_and_process_0_has_the_terminal(tmp_path: Path) -> None:
    worker = """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    text = " ".join(os.environ[name] for name in names)
    open(f"seen-{rank}", "w").write(f"{text} {sys.argv[1:]}")
    print("from", rank)
    """
    done = start(tmp_path, worker, "(3, 1, '10.0.0.7:29400')")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 0 and out == ""
    seen = [(tmp_path / f"seen-{rank}").read_text(encoding="utf-8") for rank in (2, 3)]
    assert seen == [f"{rank} {rank - 2} 6 2 10.0.0.7 29400 ['train', 'x.yaml']" for rank in (2, 3)]
    alone = start(tmp_path, worker)
    assert alone.communicate(timeout=60)[0] == "from 0\n"
    assert re.fullmatch(r"1 1 2 2 127\.0\.0\.1 \d+ .*", (tmp_path / "seen-1").read_text(encoding="utf-8"))


def test_what_all_meet_is_told_once_with_its_code(tmp_path: Path) -> None:
    starter = start(tmp_path, 'print("told", file=sys.stderr); sys.exit(2)')
    _, told = starter.communicate(timeout=60)
    assert (starter.returncode, told) == (2, "told\n")


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "process 1 was ended by SIGKILL (out of memory?)"),
        (
            "print('no memory'); sys.exit(3)",
            3,
            "process 1 ended with exit code 3, and the others ended with it\n  no m",
        ),
    ],
)
def test_where_one_fails_the_others_end_soon(tmp_path: Path, how: str, code: int, told: str) -> None:
    worker = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # stuck in a collective call
    if rank == 1:
        {how}
    time.sleep(100)
    """
    began = time.monotonic()
    starter = start(tmp_path, worker)
    _, text = starter.communicate(timeout=60)
    assert starter.returncode == code and told in text
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_once_and_there_is_time_to_save(tmp_path: Path, number: signal.Signals) -> None:
    worker = """
    count = 0
    def on_signal(number, frame):
        global count
        count += 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    open(f"ready-{rank}", "w").close()
    while not count:
        time.sleep(0.05)
    time.sleep(2.5)  # longer than a failed process would leave the others
    open(f"count-{rank}", "w").write(str(count))
    sys.exit(75)
    """
    starter = start(tmp_path, worker)
    wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
    starter.send_signal(number)
    assert starter.wait(timeout=60) == 75
    assert [(tmp_path / f"count-{rank}").read_text(encoding="utf-8") for rank in range(2)] == ["1", "1"]
    starter.communicate()


def test_on_a_machine_without_process_0_the_code_is_kept(tmp_path: Path) -> None:
    for code in (75, 2):
        starter = start(tmp_path, f"print('why'); sys.exit({code})", "(2, 1, 'head:1')")
        _, told = starter.communicate(timeout=60)
        assert starter.returncode == code
        assert ("why" in told) == (code == 2)


def test_the_processes_end_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    worker = """
    open(f"pid-{rank}", "w").write(str(os.getpid()))
    open(f"ready-{rank}", "w").close()
    time.sleep(100)
    """
    starter = start(tmp_path, worker)
    wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
    pids = [int((tmp_path / f"pid-{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    starter.kill()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its starter"
        time.sleep(0.05)
    starter.communicate()


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        (Nodes(2, 0), r"--nnodes 2 needs --rendezvous"),
        (Nodes(2, 2, "head:1"), r"--node-rank 2 with --nnodes 2"),
        (Nodes(2, 0, "head"), r"--rendezvous head is not HOST:PORT"),
        (Nodes(2, 0, "head:70000"), r"--rendezvous head:70000 is not HOST:PORT"),
    ],
)
def test_machines_that_cannot_meet(nodes: Nodes, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        nodes.address()


def test_of_two_that_end_at_once_the_one_that_lost_the_other_is_not_named(tmp_path: Path) -> None:
    # Both have ended before the starter looks for the first time.
    slow = _STARTER.replace("processes._SECONDS_TO_END", "processes._POLL_SECONDS = 3.0; processes._SECONDS_TO_END", 1)
    worker = "time.sleep(1)\nsys.exit(1) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)"
    starter = start(tmp_path, worker, starter=slow)
    _, told = starter.communicate(timeout=60)
    assert starter.returncode == 1 and "process 1 was ended by SIGKILL" in told
