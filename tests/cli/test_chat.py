"""`gemma-tune chat` in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from gemma_tune.cli.chat import chat
from gemma_tune.errors import DataError

TINY = ("gemma-tiny", "--template", "chat", "--max-new-tokens", "6")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, stdin: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(chat)
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_every_line_of_a_pipe_is_a_message(folder: Path) -> None:
    done = run(*TINY, stdin="A goat\n\n/save talk.jsonl\n/undo\n/undo\nA goat\nAnd?\n/save talk.jsonl\n/quit\nmore\n")
    assert done.exit_code == 0
    answers = done.stdout.splitlines()
    assert len(answers) == 3 and answers[0] == answers[1]
    first, second = (json.loads(line)["messages"] for line in (folder / "talk.jsonl").read_text("utf-8").splitlines())
    assert [message["content"] for message in second] == ["A goat", answers[1], "And?", answers[2]]
    assert second[:2] == first
    for told in ("row 1, 1 answers", "there is nothing to undo", "row 2, 2 answers"):
        assert told in done.stderr


def test_help_names_every_command() -> None:
    told = run(*TINY, stdin="/help\n/system Be brief.\n/reset\n").stderr
    for name in ("/help", "/reset", "/undo", "/system TEXT", "/save FILE.jsonl", "/quit"):
        assert name in told
    assert "no system turn" in told and "the talk is forgotten" in told


def test_a_mistake_in_a_pipe_ends_it() -> None:
    for line, told in (("/udno", r"no command /udno; did you mean '/undo'"), ("/save", r"/save needs a file")):
        error = run(*TINY, stdin=f"{line}\nA goat\n").exception
        assert isinstance(error, DataError)
        with pytest.raises(DataError, match=told):
            raise error
    refused = run("gemma-tiny", "--template", "dolly", stdin="Hi\n").exception
    assert isinstance(refused, DataError) and "no turns of a talk" in refused.message


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_a_mistake_is_told_and_the_talk_goes_on(folder: Path) -> None:
    program = "import sys, typer; from gemma_tune.cli.chat import chat; typer.run(chat)"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *TINY],
        stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096).decode("utf-8", errors="replace")
        seen = re.split(pattern, seen, maxsplit=1)[1]

    for line, answer in (
        ("/udno", r"did you mean '/undo'"),
        ("A goat", r"gemma> (?s:.)*tokens/s"),
        ("/quit", r"/quit"),
    ):
        wait_for(r"you> ")
        os.write(ours, f"{line}\n".encode())
        wait_for(answer)
    assert process.wait(timeout=60) == 0
    os.close(ours)
