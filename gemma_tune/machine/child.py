"""Runs a function in a process of its own: what may crash, hang, or abort where a library should raise.

`run_child("module:function", request)` starts this file as a program, which calls `function(send, **request)`. JSON
crosses the border, a line a message: the request on stdin, which stays open while its starter lives; then what the
function sends, and last what it returns or raises, on a copy of stdout. What libraries print, C code included, is kept
as the end of a log.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from gemma_tune.errors import GemmaTuneError
from gemma_tune.paths import PACKAGE_DIR

Send = Callable[..., None]
_KILLED_SECONDS = 2.0
_POLL_SECONDS = 1.0
_LOG_CHARS = 4_000


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, the signal that killed it, or neither when it was stopped for its time."""

    code: int | None
    signal: str | None
    stdout: str
    stderr: str


@dataclass(frozen=True)
class ChildEnd:
    """How a function in a process of its own ended."""

    has_result: bool  # it returned; `result` is what
    result: Any
    error: str | None  # what it raised, in a line, or None. `is_ours`: a GemmaTuneError, whose `hint` this is.
    hint: str | None
    is_ours: bool
    code: int | None  # exit code of a process that sent neither result nor error; None of one that was killed
    # name of the signal that killed it, or None. Without code, signal, result and error it ran out of time.
    signal: str | None
    log: str  # the end of what was printed

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of the log that are not empty."""
        return [line.strip() for line in self.log.splitlines() if line.strip()][-count:]


def run_child(
    function: str,
    request: Mapping[str, Any],
    *,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> ChildEnd:
    """Call a function of this package in a new process.

    Args:
        function: `module:function`; it is given a `send` whose keyword arguments become a message, and the request.
        request: its keyword arguments, as JSON.
        on_message: called with each message, in this thread.
        seconds: after this time the process is killed with all that it started.
        environment: variables to set, above those of this process.
    """
    # -P leaves out the working directory, where a user's `torch.py` may lie; so a checkout must be named.
    command = [sys.executable, "-P", "-m", "gemma_tune.machine.child", function, str(seconds or 0)]
    paths = [str(PACKAGE_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    final: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables, start_new_session=True
        )
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for job in (_write_request, _read_lines):
            threading.Thread(target=job, args=(process, request, lines), daemon=True).start()
        try:
            for message in _messages(process, lines, deadline=deadline):
                if "final" in message:
                    final = message["final"]
                    break
                on_message(message)
            code = None if final else _wait(process, deadline - time.monotonic())
        finally:
            _kill(process)
        text = _read(log)[-_LOG_CHARS:]
    return ChildEnd(
        has_result="result" in final,
        result=final.get("result"),
        error=final.get("error"),
        hint=final.get("hint"),
        is_ours=final.get("is_ours", False),
        code=code if code is None or code >= 0 else None,
        signal=_signal_name(-code) if code is not None and code < 0 else None,
        log=text,
    )


def _write_request(process: subprocess.Popen[bytes], request: Mapping[str, Any], _: queue.SimpleQueue[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it ended before it read
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()


def _read_lines(process: subprocess.Popen[bytes], _: object, lines: queue.SimpleQueue[bytes]) -> None:
    """Read in a thread that may stay behind: a process in the kernel that cannot be killed holds the pipe open."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(b"")


def _messages(
    process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes], *, deadline: float
) -> Iterator[dict[str, Any]]:
    """Yield what arrives until the stream ends, the time is up, or the process has gone and left nothing."""
    while (rest := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(rest, _POLL_SECONDS))
        except queue.Empty:
            if process.poll() is not None:  # the stream is held open by what it started
                return
            continue
        if not line:
            return
        with contextlib.suppress(ValueError):  # a process that was killed may leave half a line
            yield json.loads(line)


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
            code = _wait(process, seconds)
        finally:
            _kill(process)
        stdout, stderr = _read(out), _read(err)[-_LOG_CHARS:]
    if code is not None and code < 0:
        return Ended(None, _signal_name(-code), stdout, stderr)
    return Ended(code, None, stdout, stderr)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return the exit code, or None where the time is up before."""
    try:
        return process.wait(timeout=None if seconds == math.inf else max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started; one that hangs in the kernel is left to it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_KILLED_SECONDS)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


# --- in the process -------------------------------------------------------------------------------------------------


def _serve(function: str, seconds: float) -> None:
    """Read the request, call the function, and end."""
    if seconds and hasattr(signal, "alarm"):
        # Ends this process even where the one that started it is gone, and where native code hangs.
        signal.alarm(math.ceil(seconds) + 1)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log, C code included
    request = json.loads(os.fdopen(os.dup(0), "rb").readline())
    threading.Thread(target=_end_with_starter, daemon=True).start()

    def send(**message: Any) -> None:
        try:
            channel.write(json.dumps(message) + "\n")
            channel.flush()
        except OSError:
            os._exit(1)  # nobody listens any more

    module_name, name = function.split(":")
    try:
        result = getattr(importlib.import_module(module_name), name)(send, **request)
    except GemmaTuneError as error:
        send(final={"error": error.message, "hint": error.hint, "is_ours": True})
    except Exception as error:
        traceback.print_exc()
        send(final={"error": one_line(error)})
    else:
        send(final={"result": result})
    sys.stderr.flush()
    # No clean-up: a library's exit handler must not decide over a function that has sent everything.
    os._exit(0)


def _end_with_starter() -> None:
    """End when stdin does: whoever started this was killed, and another may begin to write the same file."""
    os.read(0, 1)
    os._exit(1)


def one_line(error: BaseException) -> str:
    """Return an exception's class and the first line of what it says."""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
