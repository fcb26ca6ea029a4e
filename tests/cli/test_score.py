from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from gemma_tune.cli.score import score
from gemma_tune.errors import DataError

TINY = ("gemma-tiny", "--template", "completion")
ROWS = [{"prompt": "A goat", "completion": " eats grass."}, {"prompt": "The", "completion": " town"}]


def run(*arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(score)
    return CliRunner().invoke(app, list(arguments))


def test_a_file_adds_up_and_agrees_with_single_answers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    file = ("--file", str(tmp_path / "rows.jsonl"))
    lines = [json.loads(line) for line in run(*TINY, *file, "--json").stdout.splitlines()]
    assert [line["where"] for line in lines] == ["rows.jsonl:1", "rows.jsonl:2"]
    for row, line in zip(ROWS, lines, strict=True):
        one = json.loads(run(*TINY, "-p", row["prompt"], "-r", row["completion"], "--json").stdout)
        assert one["log_likelihood"] == pytest.approx(line["log_likelihood"], abs=1e-3)
        assert math.fsum(token["log_prob"] for token in one["tokens"]) == pytest.approx(one["log_likelihood"])
        assert one["num_tokens"] == len(one["tokens"]) == line["num_tokens"]
    table = run(*TINY, *file).stdout.splitlines()
    total = sum(line["log_likelihood"] for line in lines)
    count = sum(line["num_tokens"] for line in lines)
    assert table[-1].split() == ["all", str(count), f"{total:.3f}", f"{math.exp(-total / count):,.3f}"]


def test_every_token_has_a_line() -> None:
    out = run(*TINY, "-p", "A goat", "-r", " eats\ngrass.").stdout
    assert "\\n" in out and "<eos>" in out and "perplexity" in out


@pytest.mark.parametrize("arguments", [(), ("-p", "x"), ("-r", "x"), ("-p", "x", "-r", "y", "--file", "z.jsonl")])
def test_half_of_what_is_needed_is_refused(arguments: tuple[str, ...]) -> None:
    assert isinstance(run(*TINY, *arguments).exception, DataError)
