"""A function in a process of its own may return, raise, crash, hang or chatter; what it started ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_tune.machine.child import run_child

FUNCTIONS = """
import os, signal, subprocess, sys, time
from gemma_tune.errors import ModelError

def add(send, *, numbers):
    os.system("echo from C")
    for number in numbers:
        send(number=number)
    return sum(numbers)

def refuse(send):
    raise ModelError("no such model", hint="take another")

def fail(send):
    raise ValueError("so\\nand so")

def abort(send):
    print("the last words", flush=True)
    os.abort()

def leave(send):
    os._exit(3)

def hang(send, *, pid):
    started = subprocess.Popen(["sleep", "600"])
    open(pid, "w").write(f"{os.getpid()} {started.pid}")
    send(waits=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def is_gone(pid: int) -> bool:
    """Whether it has ended within 5 s; one that nobody has waited for counts as ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_messages_and_the_result_come_in_order_and_what_is_printed_is_a_log() -> None:
    told: list[dict[str, int]] = []
    end = run_child("functions:add", {"numbers": [1, 2, 30_000]}, on_message=told.append)
    assert end.has_result and end.result == 30_003
    assert told == [{"number": 1}, {"number": 2}, {"number": 30_000}]
    assert end.last_lines(1) == ["from C"]


def test_a_long_request_to_a_process_that_never_reads_it() -> None:
    end = run_child("functions:leave", {"text": "x" * 10_000_000})
    assert not end.has_result and end.error is not None and end.error.startswith("TypeError")


@pytest.mark.parametrize(
    ("function", "error", "hint", "is_ours", "code", "signal"),
    [
        ("refuse", "no such model", "take another", True, None, None),
        ("fail", "ValueError: so", None, False, None, None),
        ("abort", None, None, False, None, "SIGABRT"),
        ("leave", None, None, False, 3, None),
    ],
)
def test_how_it_ended(
    function: str, error: str | None, hint: str | None, is_ours: bool, code: int | None, signal: str | None
) -> None:
    end = run_child(f"functions:{function}", {})
    assert (end.error, end.hint, end.is_ours, end.code, end.signal) == (error, hint, is_ours, code, signal)
    assert function != "abort" or end.last_lines(1) == ["the last words"]


def test_after_its_time_it_is_killed_with_what_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    end = run_child("functions:hang", {"pid": str(tmp_path / "pid")}, seconds=1.5)
    assert time.monotonic() - start < 5
    assert (end.has_result, end.error, end.code, end.signal) == (False, None, None, None)
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pid").read_text().split())


def test_it_ends_with_a_starter_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom gemma_tune.machine.child import run_child\n"
        "run_child('functions:hang', {'pid': sys.argv[1]}, on_message=lambda message: print('ready', flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "pid")], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None and starter.stdout.readline() == b"ready\n"
        starter.kill()
    child, grandchild = map(int, (tmp_path / "pid").read_text().split())
    assert is_gone(child)
    os.kill(grandchild, 9)


def test_an_exception_of_the_listener_kills_it(tmp_path: Path) -> None:
    def refuse(message: dict[str, bool]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("functions:hang", {"pid": str(tmp_path / "pid")}, on_message=refuse)
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pid").read_text().split())
