"""What reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "koi8-r", "shift_jis", "utf-8", "utf-16"])
def test_what_an_encoding_lacks_is_replaced_and_json_stays_whole(encoding: str) -> None:
    """Eight encodings of stdout; a lone surrogate, too, which no encoding has."""
    value = {"text": "“Größe” ✓ 火 \ud83d"}
    program = (
        "from gemma_tune.terminal import Terminal, make_table\n"
        f"terminal, value = Terminal(), {value!a}\n"
        "terminal.result('[bold]✓ Größe[/]'); terminal.result(make_table(('a │',), [('✓ 火',)]))\n"
        "terminal.plain(value['text']); terminal.note('✓ 火'); terminal.json_line(value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    assert len(lines) == 5 and lines[3] == value["text"].encode(encoding, "replace").decode(encoding)
    assert json.loads(lines[4]) == value


def test_a_closed_stdout_is_not_a_fault() -> None:
    program = "from gemma_tune.terminal import Terminal; Terminal().result('x')"
    assert subprocess.run(f'{sys.executable} -c "{program}" >&- 2>&-', shell=True, check=False).returncode == 0
