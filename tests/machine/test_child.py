"""A function in a process of its own may return, raise, crash, hang or chatter; what it started ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_tune.machine.child import LimitedChild, run_child

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

def open_counter(start):
    if start is None:
        raise ModelError("no start")
    calls = []
    def count(kind):
        calls.append(kind)
        if kind == "long":
            sum(range(10**12))
        if kind == "busy":
            until = time.process_time() + 0.1
            while time.process_time() < until:
                pass
        if kind == "large":
            return len(b"x" * 10**10)
        if kind == "bad":
            raise ModelError("not that", hint="another")
        if kind == "echo \\ud83d":
            return kind
        if kind == "abort":
            print("the last words", flush=True)
            os.abort()
        return start + len(calls), os.getpid()
    return count
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


def test_a_limited_child_answers_call_after_call_and_begins_again_after_one_that_took_too_much() -> None:
    child = LimitedChild("functions:open_counter", {"start": 10}, cpu_seconds=0.3, memory_bytes=400_000_000)
    count, pid = child.call(kind="short").result
    assert count == 11 and child.call(kind="short").result == [12, pid]
    assert child.call(kind="echo \ud83d").result == "echo \ud83d"
    refused = child.call(kind="bad")
    assert (refused.has_result, refused.error, refused.hint, refused.is_ours) == (False, "not that", "another", True)
    if sys.platform == "linux":
        assert child.call(kind="large").error == "MemoryError"
    assert child.call(kind="short").result[1] == pid
    assert child.call(kind="long").signal == "SIGPROF"
    assert is_gone(pid)
    count, other = child.call(kind="short").result
    assert count == 11 and other != pid
    aborted = child.call(kind="abort")
    assert aborted.signal == "SIGABRT" and aborted.last_lines(1) == ["the last words"]
    last = child.call(kind="short").result[1]
    del child
    assert is_gone(last)


def test_what_many_calls_take_together_is_limited_too() -> None:
    child = LimitedChild("functions:open_counter", {"start": 0}, cpu_seconds=0.3, memory_bytes=400_000_000)
    ends = [child.call(kind="busy") for _ in range(4)]
    assert [end.signal for end in ends].count("SIGPROF") == 1 and ends[0].has_result


def test_a_limited_child_that_cannot_be_made_says_why() -> None:
    child = LimitedChild("functions:open_counter", {"start": None}, cpu_seconds=1, memory_bytes=400_000_000)
    assert [child.call(kind="short").error for _ in range(2)] == ["no start", "no start"]
    missing = LimitedChild("functions:none", {}, cpu_seconds=1, memory_bytes=400_000_000).call()
    assert missing.code == 1 and "has no attribute 'none'" in missing.log


def test_a_limited_child_ends_with_a_starter_that_was_killed() -> None:
    program = (
        "import time\nfrom gemma_tune.machine.child import LimitedChild\n"
        "child = LimitedChild('functions:open_counter', {'start': 1}, cpu_seconds=1, memory_bytes=400_000_000)\n"
        "print(child.call(kind='short').result[1], flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    assert is_gone(pid)
