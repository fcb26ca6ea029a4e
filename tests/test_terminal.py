"""What reaches a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from gemma_tune.errors import DataError
from gemma_tune.terminal import Terminal, make_table

HOSTILE = "a\x1b]0;title\x07b\rc\x9b31m\x7f\td\n"


def printed(terminal: Terminal, *, as_terminal: bool) -> str:
    stream = io.StringIO()
    terminal.out = terminal.err = Console(file=stream, force_terminal=as_terminal, color_system=None, width=100)
    terminal.plain(HOSTILE)
    return stream.getvalue()


def test_text_of_rows_and_models_gives_a_terminal_no_orders() -> None:
    terminal = Terminal()
    shown = printed(terminal, as_terminal=True)
    assert not {"\x1b", "\x07", "\r", "\x9b", "\x7f"} & set(shown)
    assert shown.startswith("a␛]0;title␇b␍c")
    stream = io.StringIO()
    terminal.out = terminal.err = Console(file=stream, force_terminal=True, color_system=None, width=100)
    terminal.result_inline(Text(HOSTILE))
    terminal.error(DataError(HOSTILE, hint=HOSTILE))
    terminal.result(make_table(("x",), [(HOSTILE,)]))
    assert "␛]0;title" in stream.getvalue() and "\x1b]0;" not in stream.getvalue()


def test_a_pipe_gets_the_text_as_it_is() -> None:
    assert printed(Terminal(), as_terminal=False).startswith("a\x1b]0;title")
