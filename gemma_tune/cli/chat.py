"""`gemma-tune chat`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from gemma_tune.cli.answering import Base, TargetName, TemplateName, note_base, with_answer_settings
from gemma_tune.errors import GemmaTuneError
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.terminal import Terminal

if TYPE_CHECKING:
    from gemma_tune.inference.chat import Talk


@with_answer_settings(without=["batch_size"])
def chat(target: TargetName, template: TemplateName = None, base: Base = False, *, settings: AnswerSettings) -> None:
    """Talk with a model that knows chat turns. In a pipe, every line of stdin is a message."""
    from gemma_tune.inference.chat import Talk, obey, require_turns
    from gemma_tune.inference.target import find_target
    from gemma_tune.machine.quiet import libraries_to

    terminal = Terminal()
    is_person = sys.stdin.isatty()
    with libraries_to(None):
        found = find_target(target, template=template, without_adapter=base)
        note_base(terminal, found)
        require_turns(found.template, target=target)

        from gemma_tune.inference.load_target import load_target

        if is_person:
            terminal.note(f"[dim]loading {escape(target)} …[/]")
        talk = Talk(load_target(found), settings=settings)
    if is_person:
        terminal.note("[dim]/help lists the commands, Ctrl-D ends[/]")
    for line in _lines(terminal, is_person=is_person):
        try:
            if line.startswith("/"):
                said = obey(talk, line)
                if talk.is_over:
                    return
                terminal.note(escape(said))
            elif line:
                with libraries_to(None):
                    _answer(terminal, talk, line, is_person=is_person)
        except GemmaTuneError as error:
            if not is_person:
                raise
            terminal.error(error)


def _lines(terminal: Terminal, *, is_person: bool) -> Iterator[str]:
    """What is typed, or the lines of a pipe, without white space at their ends."""
    if not is_person:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its keys and a history)
    while True:
        try:
            yield input("you> ").strip()
        except (EOFError, OSError):  # the second: the terminal has gone
            terminal.plain("")
            return
        except KeyboardInterrupt:
            terminal.note("\n[dim]Ctrl-D or /quit ends[/]")


def _answer(terminal: Terminal, talk: Talk, text: str, *, is_person: bool) -> None:
    if is_person:
        terminal.result_inline(Text("gemma> ", style="bold cyan"))
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        terminal.plain(piece, end="")

    started = time.perf_counter()
    try:
        completion = talk.ask(text, on_text=show)
    except KeyboardInterrupt:
        if not is_person:
            raise
        terminal.note("\n[dim]interrupted; question and answer are forgotten[/]")
        return
    terminal.plain("" if pieces else completion.text)  # beams give no pieces
    if is_person:
        seconds = time.perf_counter() - started
        cut = "" if completion.stopped else ", cut at its longest length"
        terminal.note(f"[dim]{completion.num_tokens} tokens, {completion.num_tokens / seconds:,.0f} tokens/s{cut}[/]")
