"""`gemma-tune evaluate`: what it asks for and what it prints. The figures have tests of their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli.evaluate import evaluate
from gemma_tune.evaluation.evaluate import EvaluateSettings
from gemma_tune.runs.evaluation import Evaluation
from gemma_tune.runs.layout import RunDir
from tests.reporting.made_runs import drawn_evaluation, make_run_in

EVALUATION = drawn_evaluation("open_qa")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run_in(tmp_path, evaluated=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asked for; it is answered at once."""
    found: dict[str, Any] = {"is_new": True}

    def evaluate_run(run: RunDir, **arguments: Any) -> tuple[Evaluation, bool]:
        found.update(arguments)
        return EVALUATION, found["is_new"]

    monkeypatch.setattr("gemma_tune.evaluation.evaluate.evaluate_run", evaluate_run)
    return found


def test_every_option_arrives(run: RunDir, asked: dict[str, Any]) -> None:
    evaluate(
        run.path,
        rows=7,
        source="mine.jsonl",
        what="tuned",
        max_new_tokens=9,
        batch_size=2,
        expect_json=True,
        again=True,
    )
    assert asked["settings"] == EvaluateSettings(("tuned",), "mine.jsonl", 7, 9, 2, True)
    assert asked["again"] is True


def test_the_tables(run: RunDir, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(run.path)
    assert asked["settings"] == EvaluateSettings()
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert "8 rows of open_qa rows" in lines
    assert "base tuned difference" in lines
    (matches,) = [line for line in lines if line.startswith("exact match ") and "by category" not in line]
    assert matches.startswith("exact match 0.0 % [0.0, 32.4] 75.0 % [40.9, 92.9] +75.0 [+37.5, +100.0]")
    assert any(line.startswith("open_qa 5 0.0 %") for line in lines)
    assert any(line.startswith("(none) 3 0.0 %") for line in lines)
    assert "Forgetting: 4 texts (plain prose)" in lines
    assert "nothing has changed" not in printed.err
    asked["is_new"] = False
    evaluate(run.path)
    assert "measured 2026-01-01T00:00:00+00:00, and nothing has changed since" in capsys.readouterr().err


def test_json(run: RunDir, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(run.path, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(EVALUATION)))
