"""`gemma-tune generate`: what goes where, and a file of questions that survives a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from gemma_tune.cli.generate import generate
from gemma_tune.errors import DataError

TINY = ("gemma-tiny", "--template", "completion")
SAMPLER = '''
"""Draws between the two likeliest tokens."""
import torch


def sample(logits):
    likeliest = logits.topk(2, dim=-1)
    drawn = torch.multinomial(likeliest.values.softmax(-1), 1)
    return likeliest.indices.gather(-1, drawn)[:, 0]
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, stdin: str = "") -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(generate)
    return CliRunner().invoke(app, list(arguments), input=stdin)


def answers(*arguments: str, stdin: str = "") -> list[str]:
    done = run(*arguments, "--max-new-tokens", "8", "--json", stdin=stdin)
    assert done.exit_code == 0, done.exception
    return [json.loads(line)["answer"] for line in done.stdout.splitlines()]


def test_answers_go_to_stdout_and_the_speed_to_stderr() -> None:
    done = run(*TINY, "--prompt", "A goat", "--max-new-tokens", "8")
    assert "tokens/s" not in done.stdout
    assert "8 tokens in " in done.stderr and "tokens/s)" in done.stderr
    line = json.loads(run(*TINY, "--prompt", "A goat", "--max-new-tokens", "8", "--json").stdout)
    assert line == {"prompt": "A goat", "answer": done.stdout.removesuffix("\n"), "num_tokens": 8, "stopped": False}


def test_the_same_questions_from_options_stdin_and_files(folder: Path) -> None:
    questions = ["A goat", "The town of Ostel"]
    wanted = answers(*TINY, "--prompt", questions[0], "--prompt", questions[1])
    assert len(wanted) == 2
    assert answers(*TINY, stdin=questions[1]) == wanted[1:]
    (folder / "questions.txt").write_text("\n".join(questions), encoding="utf-8")
    assert answers(*TINY, "--file", "questions.txt") == wanted
    assert answers(*TINY, "--file", "-", stdin="\n".join(questions)) == wanted
    assert not (folder / "out.jsonl").exists()
    written = run(*TINY, "--file", "questions.txt", "--output", "out.jsonl", "--max-new-tokens", "8")
    assert (written.exit_code, written.stdout) == (0, "")
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == questions
    assert [row["answer"] for row in rows] == wanted


def test_a_sampler_of_ones_own_in_ten_lines(folder: Path) -> None:
    (folder / "mine.py").write_text(SAMPLER, encoding="utf-8")
    assert len(SAMPLER.strip().splitlines()) < 10
    own = [answers(*TINY, "-p", "A goat", "--sampler", "mine.py:sample", "--seed", str(seed)) for seed in (1, 1, 2, 3)]
    assert own[0] == own[1]
    assert own[2] != own[0] or own[3] != own[0]


def test_beams_and_stop_strings() -> None:
    asked = [word for text in ("A goat", "The", "In", "A baker", "Once") for word in ("-p", text)]
    greedy, beams, cut = (answers(*TINY, *asked, *more) for more in ((), ("--beams", "4"), ("--stop", "e")))
    assert beams != greedy
    assert cut == [text.split("e")[0].strip() for text in greedy]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", "x", "--file", "y.txt"), r"either --prompt or --file"),
        ((), r"nothing is asked"),
        (("--prompt", "x", "--sampler", "topk"), r"did you mean 'top-k'"),
        (("--prompt", "x", "--context", "y"), r"completion has no context"),
        (("--prompt", "x", "--stop", ""), r"a stop string is empty"),
        (("--prompt", "x", "--output", "none/x.jsonl"), r"there is no directory none"),
        (("--file", "none.jsonl"), r"none.jsonl"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], told: str) -> None:
    done = run(*TINY, *arguments)
    assert isinstance(done.exception, DataError)
    with pytest.raises(DataError, match=told):
        raise done.exception


@pytest.mark.slow
def test_a_killed_file_goes_on_to_the_same_bytes(folder: Path) -> None:
    (folder / "questions.txt").write_text("\n".join(f"{n} goats" for n in range(40)), encoding="utf-8")
    command = [*TINY, "--file", "questions.txt", "--max-new-tokens", "32", "--batch-size", "1", "--temperature", "1"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "gemma_tune.cli.app", "generate", *command, "--output", "killed.jsonl"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.DEVNULL,
    )
    partial = folder / "killed.jsonl.partial"
    deadline = time.monotonic() + 240
    while not (partial.is_file() and partial.read_bytes().count(b"\n") >= 8):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    left = partial.read_bytes()
    assert not (folder / "killed.jsonl").exists() and left.count(b"\n") < 40
    assert "answers were made before; resuming after them" in run(*command, "--output", "killed.jsonl").stderr
    assert run(*command, "--output", "whole.jsonl").exit_code == 0
    whole = (folder / "whole.jsonl").read_bytes()
    assert (folder / "killed.jsonl").read_bytes() == whole
    assert whole.startswith(left[: left.rindex(b"\n")])
