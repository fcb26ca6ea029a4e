"""Runs the probes of worker.py, each in a process of its own: imports of native libraries, drivers, the network."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma_tune.machine.child import run_child


@dataclass(frozen=True)
class Probed:
    """What a probe of worker.py reported."""

    # done, failed (an exception), crashed (a signal) or hung (stopped after its time)
    outcome: Literal["done", "failed", "crashed", "hung"]
    step: str  # what it was doing last, such as `importing torch`
    facts: Mapping[str, Any]  # everything it sent until then
    error: str  # the exception in a line, the signal, or the time it had
    seconds: float

    @property
    def trouble(self) -> str:
        """The failure as words for the table; only of a probe that is not done."""
        return f"{self.error} while {self.step}"


def run_probe(name: str, request: Mapping[str, Any] | None = None, *, seconds: float) -> Probed:
    """Run `probe_<name>` of worker.py with its arguments, at most `seconds` long."""
    start = time.monotonic()
    facts: dict[str, Any] = {}
    end = run_child(f"gemma_tune.doctor.worker:probe_{name}", request or {}, on_message=facts.update, seconds=seconds)
    step, took = facts.pop("step", "starting"), time.monotonic() - start
    if end.has_result:
        return Probed("done", step, facts, "", took)
    if end.signal is not None:
        return Probed("crashed", step, facts, f"crashed ({end.signal})", took)
    if end.error is None and end.code is None:
        return Probed("hung", step, facts, f"no answer within {seconds:.0f} s", took)
    last = "".join(f" ({line})" for line in end.last_lines(1))
    return Probed("failed", step, facts, end.error or f"ended with code {end.code}{last}", took)


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
