"""Runs a function in a process of its own: what may crash, hang, or abort where a library should raise.

`run_child("module:function", request)` starts this file as a program, which calls `function(send, **request)`. JSON
crosses the border, a line a message: the request on stdin, which stays open while its starter lives; then what the
function sends, and last what it returns or raises, on a copy of stdout. What libraries print, C code included, is kept
as the end of a log. A `LimitedChild` answers call after call in the same way, under limits of time and memory.
"""

import contextlib
import functools
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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from gemma_tune.errors import GemmaTuneError
from gemma_tune.paths import PACKAGE_DIR

Send = Callable[..., None]
_KILLED_SECONDS = 2.0
_POLL_SECONDS = 1.0
_LOG_CHARS = 4_000
# What a call to a LimitedChild adds to the computing time that is left to it, and each byte of its request.
_EARNED_SECONDS, _EARNED_SECONDS_PER_BYTE = 5e-3, 30e-6
_WALL_SECONDS_PER_CPU_SECOND = 10


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
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    final: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        process, lines = _start([function, str(seconds or 0)], log, environment or {})
        threading.Thread(target=_write_line, args=(process, request), daemon=True).start()
        try:
            for message in _messages(process, lines, deadline=deadline):
                if "final" in message:
                    final = message["final"]
                    break
                on_message(message)
            code = None if final else _wait(process, deadline - time.monotonic())
        finally:
            _kill(process)
        return _child_end(final, code, log)


class LimitedChild:
    """A process for what others wrote: it answers call after call, and ends where one takes too much.

    Time is computing time, so that a busy machine refuses nothing: `cpu_seconds` for one call, and over many of them
    what they earn (`_EARNED_SECONDS`). Memory is bounded on Linux; macOS does not enforce RLIMIT_AS and Windows has
    none, nor a timer: there the time bounds both.
    """

    def __init__(self, factory: str, setup: Mapping[str, Any], *, cpu_seconds: float, memory_bytes: int) -> None:
        """Prepare it; the first call starts the process.

        Args:
            factory: `module:function`; called there with `setup`, as JSON, it returns what each call calls.
            setup: its keyword arguments.
            cpu_seconds: of one call; its end has the signal SIGPROF.
            memory_bytes: of address space; its end has a MemoryError.
        """
        self._arguments = [factory, str(cpu_seconds), str(memory_bytes)]
        self._setup = setup
        self._wall_seconds = _WALL_SECONDS_PER_CPU_SECOND * cpu_seconds
        self._lock = threading.Lock()
        self._started: tuple[subprocess.Popen[bytes], queue.SimpleQueue[bytes], IO[bytes]] | None = None

    def call(self, **request: Any) -> ChildEnd:
        """Call it with keyword arguments, as JSON, in the process of the call before, or in a new one."""
        with self._lock:
            if self._started is None:
                log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
                self._started = (*_start(self._arguments, log, {}), log)
                self._stop = weakref.finalize(self, _stop, self._started[0], log)
                _write_line(self._started[0], self._setup)
            process, lines, log = self._started
            deadline = time.monotonic() + self._wall_seconds
            final: dict[str, Any] = {}
            try:
                _write_line(process, request)
                final = next(_messages(process, lines, deadline=deadline), {}).get("final", {})
                code = None if final else _wait(process, deadline - time.monotonic())
                return _child_end(final, code, None if final else log)
            finally:
                if not final:  # it has ended, or this call was interrupted: its answer must not be another's
                    self._stop()
                    self._started = None


def _stop(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    _kill(process)
    log.close()
    with contextlib.suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()


def _start(
    arguments: Sequence[str], log: IO[bytes], environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], queue.SimpleQueue[bytes]]:
    """Start this file as a program; return its process, and the lines that it will have sent."""
    # -P leaves out the working directory, where a user's `torch.py` may lie; so a checkout must be named.
    command = [sys.executable, "-P", "-m", "gemma_tune.machine.child", *arguments]
    paths = [str(PACKAGE_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables, start_new_session=True
    )
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    return process, lines


def _child_end(final: Mapping[str, Any], code: int | None, log: IO[bytes] | None) -> ChildEnd:
    return ChildEnd(
        has_result="result" in final,
        result=final.get("result"),
        error=final.get("error"),
        hint=final.get("hint"),
        is_ours=final.get("is_ours", False),
        code=code if code is None or code >= 0 else None,
        signal=_signal_name(-code) if code is not None and code < 0 else None,
        log=_read(log)[-_LOG_CHARS:] if log else "",
    )


def _write_line(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it ended before it read
        process.stdin.write(_to_line(request))
        process.stdin.flush()


def _to_line(message: Mapping[str, Any]) -> bytes:
    """Write as UTF-8, also half a character, which rows may hold."""
    return json.dumps(message, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def _from_line(line: bytes) -> Any:
    return json.loads(line.decode(errors="surrogatepass"))


def _read_lines(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Read in a thread that may stay behind: a process in the kernel that cannot be killed holds the pipe open."""
    assert process.stdout is not None
    with process.stdout as sent:
        for line in sent:
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
            yield _from_line(line)


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
    send = _open_channel()
    request = _from_line(os.fdopen(os.dup(0), "rb").readline())
    threading.Thread(target=_end_with_starter, daemon=True).start()
    send(final=_outcome(lambda: _function(function)(send, **request)))
    sys.stderr.flush()
    # No clean-up: a library's exit handler must not decide over a function that has sent everything.
    os._exit(0)


def _serve_calls(factory: str, cpu_seconds: float, memory_bytes: int) -> None:
    """Answer call after call until stdin ends, as it does when the starter ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows; a limit that is lower already
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    send = _open_channel()
    requests = os.fdopen(os.dup(0), "rb")
    make = functools.cache(functools.partial(_function(factory), **_from_line(requests.readline())))
    left = cpu_seconds
    for line in requests:
        left = min(left + _EARNED_SECONDS + len(line) * _EARNED_SECONDS_PER_BYTE, cpu_seconds)
        before = time.process_time()
        _end_after(max(left, 0.01))
        send(final=_outcome(functools.partial(lambda line: make()(**_from_line(line)), line)))
        _end_after(0)
        left -= time.process_time() - before
    os._exit(0)


def _end_after(cpu_seconds: float) -> None:
    """Let the kernel end this process after that much computing, in native code as well; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def _open_channel() -> Send:
    """Return what sends a message to the starter; what libraries print goes to the log, C code included."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        try:
            channel.write(_to_line(message))
            channel.flush()
        except OSError:
            os._exit(1)  # nobody listens any more

    return send


def _function(name: str) -> Callable[..., Any]:
    module, name = name.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what a call returns or raises, as JSON."""
    try:
        return {"result": call()}
    except GemmaTuneError as error:
        return {"error": error.message, "hint": error.hint, "is_ours": True}
    except Exception as error:
        traceback.print_exc()
        return {"error": one_line(error)}


def _end_with_starter() -> None:
    """End when stdin does: whoever started this was killed, and another may begin to write the same file."""
    os.read(0, 1)
    os._exit(1)


def one_line(error: BaseException) -> str:
    """Return an exception's class and the first line of what it says."""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _serve(sys.argv[1], float(sys.argv[2]))
    else:
        _serve_calls(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
