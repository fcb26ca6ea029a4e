"""Starts the processes of `gemma-tune train --nproc N`, passes signals on to them, and ends them together.

They find each other through the variables that torchrun sets, so that `torchrun -m gemma_tune.cli.app train RECIPE`
works as well. Our own start keeps what torchrun's loses: the exit code, the first Ctrl-C that waits for a checkpoint
however long a step takes, and one message for a mistake that all processes meet.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, NoReturn

from gemma_tune.errors import EngineError, GemmaTuneError, ProcessLost, TrainingInterrupted

PROGRAM = (sys.executable, "-m", "gemma_tune.cli.app")
_LAUNCHED = "GEMMA_TUNE_LAUNCHED"  # set in a process that `run_processes` started
# After the first process has failed the others may end by themselves, then are asked to, then are killed.
_SECONDS_TO_END, _SECONDS_TO_OBEY = 15.0, 15.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Nodes:
    """The machines that train together, as torchrun counts them: this one's number from 0 is `rank`, and all processes
    meet at `rendezvous`, HOST:PORT of machine 0."""

    count: int = 1
    rank: int = 0
    rendezvous: str | None = None

    def address(self) -> tuple[str, str]:
        """Host and port to meet at; on a single machine a port that is free now.

        Raises:
            EngineError: the rendezvous is missing or is not HOST:PORT, or `rank` is not below `count`.
        """
        if not 0 <= self.rank < self.count:
            raise EngineError(
                f"--node-rank {self.rank} with --nnodes {self.count}",
                hint=f"the machines are numbered from 0 to {self.count - 1}",
            )
        if self.rendezvous is None:
            if self.count > 1:
                raise EngineError(
                    f"--nnodes {self.count} needs --rendezvous", hint="give HOST:PORT of machine 0, the same on all"
                )
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                return "127.0.0.1", str(free.getsockname()[1])
        host, _, port = self.rendezvous.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise EngineError(f"--rendezvous {self.rendezvous} is not HOST:PORT", hint="such as 10.0.0.1:29500")
        return host, port


@dataclass
class _Worker:
    """A started process, and where its output goes; None when it goes where ours goes."""

    rank: int
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None


def run_processes(arguments: Sequence[str], *, per_machine: int, nodes: Nodes) -> int:
    """Run `gemma-tune` with these arguments in several processes of this machine; returns the exit code.

    Process 0 has our terminal. The code is that of the process that ended first of those that failed.

    Raises:
        ProcessLost: a process failed, and it was not process 0 on our terminal that said why.
        EngineError: the machines are not described well.
    """
    host, port = nodes.address()
    shared = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(per_machine * nodes.count),
        "LOCAL_WORLD_SIZE": str(per_machine),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // per_machine, 1)),
        _LAUNCHED: "1",
    }
    with ExitStack() as stack:
        workers: list[_Worker] = []
        stack.callback(_kill, workers)
        for local_rank in range(per_machine):
            rank = nodes.rank * per_machine + local_rank
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            output = None if rank == 0 else stack.enter_context(tempfile.TemporaryFile())
            workers.append(_start(arguments, rank=rank, environment=shared | own, output=output))
        with _passing_signals(workers):
            first = _wait(workers)
        if first is None:
            return 0
        code: int = first.process.returncode
        is_reported = any(worker.rank == 0 and worker.process.returncode == code for worker in workers)
        if code > 0 and (is_reported or code == TrainingInterrupted.exit_code):
            return code
        error = ProcessLost(
            f"process {first.rank} {_how_it_ended(code)}, and the others ended with it{_last_words(first)}",
            hint="resume with --resume: the last checkpoint is whole" if code != GemmaTuneError.exit_code else None,
        )
        error.exit_code = max(code, ProcessLost.exit_code)
        raise error


def end_with_the_starter() -> None:
    """In a process that `run_processes` started: stop as on SIGTERM when the starting process is gone.

    Its end closes our standard input, even where it was killed.
    """
    if os.environ.get(_LAUNCHED) != "1":
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask to stop: Ctrl-C, the scheduler's, and a closed terminal's."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    return numbers


def is_one_of_several() -> bool:
    """Whether this process was started to train together with others, by us or by torchrun."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def end_process(code: int) -> NoReturn:
    """End one of several processes at once, after what waits for the end, such as a tracker, has had its turn.

    Threads of the communication may hold Python objects to the last. An interpreter that is torn down under them aborts
    in a few of a hundred cases: exit code 134 for a training that is complete (Python 3.11, torch 2.13, gloo).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(arguments: Sequence[str], *, rank: int, environment: Mapping[str, str], output: IO[bytes] | None) -> _Worker:
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C comes to us alone, and from us once to each
    )
    return _Worker(rank, process, output)


@contextmanager
def _passing_signals(workers: Sequence[_Worker]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        _signal(workers, signal.Signals(number))

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[_Worker]) -> _Worker | None:
    """Wait until all have ended; returns the first that failed, or None."""
    first: _Worker | None = None
    failed_at = 0.0
    asked = killed = False
    while True:
        codes = [worker.process.poll() for worker in workers]
        if first is None:
            failed = [worker for worker, code in zip(workers, codes, strict=True) if code]
            # Of several at once, one that only lost the others is not the cause.
            first = min(failed, key=lambda worker: worker.process.returncode == ProcessLost.exit_code, default=None)
            failed_at = time.monotonic()
        if None not in codes:
            return first
        since = time.monotonic() - failed_at
        if first is not None and since > _SECONDS_TO_END and not asked:
            _signal(workers, signal.SIGTERM)
            asked = True
        if first is not None and since > _SECONDS_TO_END + _SECONDS_TO_OBEY and not killed:
            _signal(workers, signal.SIGKILL)
            killed = True
        time.sleep(_POLL_SECONDS)


def _signal(workers: Sequence[_Worker], number: signal.Signals) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.send_signal(number)


def _kill(workers: Sequence[_Worker]) -> None:
    _signal(workers, signal.SIGKILL)
    for worker in workers:
        worker.process.wait()
        if worker.process.stdin is not None:
            worker.process.stdin.close()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    reason = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{reason}"


def _last_words(worker: _Worker) -> str:
    if worker.output is None:
        return ""
    worker.output.seek(0)
    lines = worker.output.read().decode("utf-8", errors="replace").strip().splitlines()
    return "".join(f"\n  {line}" for line in lines[-20:])
