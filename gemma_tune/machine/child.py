"""Runs what may crash or hang in a process of its own: imports of native libraries, drivers, the network."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_KILLED_SECONDS = 2.0
_TAIL_CHARS = 2_000


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, the signal that killed it, or neither when it was stopped for its time."""

    code: int | None
    signal: str | None
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Probed:
    """What a probe of worker.py told.

    Attributes:
        outcome: done, failed (an exception), crashed (a signal) or hung (stopped after its time).
        step: what it was doing last, such as `importing torch`.
        facts: everything it told until then.
        error: the exception in a line, the signal, or the time it had.
    """

    outcome: Literal["done", "failed", "crashed", "hung"]
    step: str
    facts: Mapping[str, Any]
    error: str
    seconds: float

    @property
    def trouble(self) -> str:
        """The failure as words for the table; only of a probe that is not done."""
        return f"{self.error} while {self.step}"


def run_probe(name: str, request: Mapping[str, Any] | None = None, *, seconds: float) -> Probed:
    """Run the probe `name` of worker.py with its arguments, at most `seconds` long."""
    start = time.monotonic()
    # -P: a torch.py in the folder where the command is run is no concern of a run, and must be none of a probe.
    command = [sys.executable, "-P", "-m", "gemma_tune.doctor.worker", name, str(seconds), json.dumps(request or {})]
    ended = run_command(command, seconds=seconds)
    facts: dict[str, Any] = {}
    step, error = "starting", None
    for line in ended.stdout.splitlines():
        with contextlib.suppress(ValueError):  # a process that was killed may leave half a line
            told = json.loads(line)
            facts.update(told.get("facts", {}))
            step = told.get("step", step)
            error = told.get("error", error)
    took = time.monotonic() - start
    if ended.signal is not None:
        return Probed("crashed", step, facts, f"crashed ({ended.signal})", took)
    if ended.code is None:
        return Probed("hung", step, facts, f"no answer within {seconds:.0f} s", took)
    if ended.code != 0 or error is not None:
        last = "".join(f" ({line})" for line in ended.stderr.strip().splitlines()[-1:])
        return Probed("failed", step, facts, error or f"ended with code {ended.code}{last}", took)
    return Probed("done", step, facts, "", took)


def run_command(command: Sequence[str], *, seconds: float) -> Ended:
    """Run a command without a terminal; after `seconds` it is killed with all that it started.

    Its output goes to files: a pipe could be held open by a process in the kernel that cannot be killed.

    Raises:
        OSError: there is no such program.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, close_fds=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_KILLED_SECONDS)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")[-_TAIL_CHARS:]
    if code is not None and code < 0:
        return Ended(None, _signal_name(-code), stdout, stderr)
    return Ended(code, None, stdout, stderr)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def run_probes(
    wanted: Mapping[str, tuple[float, Mapping[str, Any]]], *, progress: Callable[[str, int, int], None]
) -> dict[str, Probed]:
    """Run several probes at the same time; each has its seconds and arguments.

    Args:
        progress: called with the name of a probe that is done, how many are, and of how many.
    """
    results: queue.Queue[tuple[str, Probed]] = queue.Queue()

    def run(name: str) -> None:
        seconds, arguments = wanted[name]
        results.put((name, run_probe(name, arguments, seconds=seconds)))

    for name in wanted:
        # Daemons: Ctrl-C does not wait for them, and the processes that they started end by themselves.
        threading.Thread(target=run, args=(name,), daemon=True).start()
    probed: dict[str, Probed] = {}
    while len(probed) < len(wanted):
        name, result = results.get()
        probed[name] = result
        progress(name, len(probed), len(wanted))
    return probed
