"""The only place that prints: results to stdout, progress and messages to stderr, plain text in a pipe."""

from __future__ import annotations

import errno
import io
import json
import os
import select
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gemma_tune.disk import reason_of, to_json, to_json_lines
from gemma_tune.errors import GemmaTuneError
from gemma_tune.runs.reporter import StepProgress
from gemma_tune.secrets import mask_secrets
from gemma_tune.text import format_bytes, format_seconds, without_controls

# In a pipe a line of progress comes at most this often (seconds), except the first and the last.
_PIPE_INTERVAL_SECONDS = 10.0
# How a stream treats what its encoding lacks where the locale is C (the second), or any other: it raises.
_RAISING = ("strict", "surrogateescape")


class _Output(io.FileIO):
    """stdout or stderr whose loss is not the end of the work: a full disk, a reader or a terminal that has gone.

    The first write that fails is reported on stderr, where somebody may still read it; what follows is dropped.
    """

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        if self.lost is None:
            try:
                while (written := super().write(data)) is None:  # the pipe is full, and somebody made it non-blocking
                    select.select([], [self], [])
                return written
            except OSError as cause:
                self.lost = cause
                if cause.errno not in (errno.EPIPE, errno.EIO) and self.fileno() == 1:
                    with suppress(OSError):
                        os.write(2, f"! stdout: {reason_of(cause)}; what follows is not printed\n".encode())
        return memoryview(data).nbytes


def guard_output() -> None:
    """Replace this program's stdout and stderr by ones that never raise, whatever becomes of their other end.

    Of stdin, what is not UTF-8 is read as halves of characters, which whoever reads it refuses in a sentence.

    A descriptor that the shell closed (`>&-`) is opened on nothing: otherwise the next file to be opened would get its
    number, and what a library prints.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        is_file = isinstance(getattr(stream, "buffer", None), io.BufferedWriter | io.FileIO)
        if isinstance(stream, io.TextIOWrapper) and is_file and not (sys.platform == "win32" and stream.isatty()):
            output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            errors = "replace" if stream.errors in _RAISING else stream.errors
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, errors, line_buffering=stream.line_buffering))


def _console(stream: Any) -> Console:
    if stream is None:  # closed by the shell (`>&-`)
        return Console(file=io.StringIO())
    if isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISING:
        # A pipe on Windows is cp1252, in a cron job ASCII: what cannot be written is replaced, after the work was done.
        stream.reconfigure(errors="replace")
    # A pipe has no width: 80 columns would cut tables and paths that a program reads.
    return Console(file=stream, highlight=False, soft_wrap=not stream.isatty(), width=None if stream.isatty() else 200)


class Terminal:
    """stdout and stderr of this process as they are now; libraries that redirect them later do not reach it."""

    def __init__(self) -> None:
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)

    def require_reader(self) -> None:
        """End the program where nobody reads stdout any more, and all that is left to do is to print.

        Raises:
            SystemExit: 141 after a closed pipe, as its signal would; 2 where it cannot be written.
        """
        output = getattr(getattr(self.out.file, "buffer", None), "raw", None)
        if isinstance(output, _Output) and output.lost is not None:
            raise SystemExit(141 if output.lost.errno == errno.EPIPE else 2)

    def result(self, text: str | Text | Table) -> None:
        self.out.print(_masked(text))

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        heading: str | None = None,
        right: Sequence[int] = (),
    ) -> None:
        """Print the table that `make_table` makes, under a heading; an empty one leaves a line free."""
        if heading is not None:
            self.result(Text(f"\n{heading}", style="bold") if heading else "")
        self.result(make_table(columns, rows, right=right))

    def plain(self, text: str, *, end: str = "\n") -> None:
        """Text that is not ours to style: rows, YAML, model output."""
        text = mask_secrets(text)
        self.out.print(Text(without_controls(text) if self.out.is_terminal else text), end=end, soft_wrap=True)

    def json(self, value: object) -> None:
        self._json(to_json(value), indent=2)

    def json_line(self, value: object) -> None:
        self._json(to_json_lines([value]), indent=None)

    def _json(self, text: str, *, indent: int | None) -> None:
        """Escape what the stream cannot write: in JSON nothing is lost, whatever the encoding."""
        try:
            text.encode(self.out.encoding)
        except UnicodeEncodeError:
            text = json.dumps(json.loads(text), indent=indent) + "\n"
        self.plain(text, end="")

    def result_inline(self, text: Text) -> None:
        text.plain = _safe(text.plain)
        self.out.print(text, end="", soft_wrap=True)

    def note(self, text: str | Text) -> None:
        self.err.print(_masked(text))

    def error(self, error: GemmaTuneError) -> None:
        self.err.print(f"[bold red]error:[/] {escape(_safe(error.message))}", soft_wrap=True)
        if error.hint:
            self.err.print(f"[cyan]hint:[/] {escape(_safe(error.hint))}", soft_wrap=True)


class TerminalReporter:
    """Draws a run on stderr: stages with their facts, and one live line while training."""

    def __init__(self, terminal: Terminal) -> None:
        self.console = terminal.err
        self.live: Progress | None = None
        self.last_printed = 0.0

    def __enter__(self) -> TerminalReporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_live()

    def stage(self, title: str) -> None:
        self._end_live()
        self.console.print(f"[bold blue]●[/] [bold]{mask_secrets(title)}[/]")

    def detail(self, text: str) -> None:
        self._end_live()
        self.console.print(f"  {escape(mask_secrets(text))}")

    def warn(self, text: str) -> None:
        self.console.print(f"  [yellow]![/] {escape(mask_secrets(text))}")

    def step(self, progress: StepProgress) -> None:
        facts = (
            f"loss {progress.loss:.3f}  {progress.tokens_per_second:,.0f} tokens/s  "
            f"{format_bytes(progress.memory_bytes)}"
            f"  ETA {format_seconds(progress.eta_seconds)}"
        )
        self._advance(f"step {progress.step}/{progress.total_steps}", progress.step, progress.total_steps, facts)

    def evaluated(self, *, step: int, loss: float) -> None:
        self.console.print(f"  step {step}: eval loss {loss:.3f}")

    def progress(self, what: str, done: int, total: int) -> None:
        self._advance(f"{done}/{total} {what}", done, total, "")

    def progress_bytes(self, what: str, done: int, total: int) -> None:
        self._advance(f"{format_bytes(done)} of {format_bytes(total)} {what}", done, total, "")

    def _advance(self, label: str, done: int, total: int, facts: str) -> None:
        label = mask_secrets(label)
        if not self.console.is_terminal:
            now = time.monotonic()
            if done == total or now - self.last_printed >= _PIPE_INTERVAL_SECONDS:
                self.last_printed = now
                self.console.print(f"  {label}  {facts}".rstrip())
            return
        if self.live is None:
            self.live = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
                # rich would put its own stdout and stderr over those of engines.quiet, and show what libraries print.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.live.add_task(label, total=total, facts=facts)
            self.live.start()
        self.live.update(self.live.task_ids[0], description=label, completed=done, total=total, facts=facts)
        if done >= total:
            self._end_live()

    def _end_live(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def _told(cell: object) -> str:
    return "—" if cell is None else _safe(str(cell))


def _safe(text: str) -> str:
    return without_controls(mask_secrets(text))


def _masked(shown: str | Text | Table) -> str | Text | Table:
    """What is shown without its credentials; a table's cells are masked when it is made."""
    if isinstance(shown, str):
        return mask_secrets(shown)
    if isinstance(shown, Text) and (masked := mask_secrets(shown.plain)) != shown.plain:
        return Text(masked)
    return shown


def make_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = (), whole: Sequence[int] = ()
) -> Table:
    """Make a table of cells that are not parsed for markup.

    Args:
        right: indices of columns that are aligned to the right.
        whole: indices of columns that are never broken into lines.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index in right else "left"
        table.add_column(_safe(column), justify=justify, overflow="fold", no_wrap=index in whole)
    for row in rows:
        table.add_row(*(_masked(cell) if isinstance(cell, Text) else Text(_told(cell)) for cell in row))
    return table
