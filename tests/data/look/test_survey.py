"""An audit of a recipe's rows, and that they are never whole in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.encode import encoder as tokenize
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.look.audit import AuditReport, audit_rows
from gemma_tune.data.look.survey import survey_rows
from gemma_tune.data.rows.read import read_examples
from gemma_tune.data.text import duplicates
from gemma_tune.recipe.schema import DataSection


def _section(path: Path, **settings: Any) -> DataSection:
    return DataSection(**{"source": str(path), "template": "dolly", "max_seq_tokens": 100_000} | settings)


def _audit(section: DataSection, tokenizer: Any) -> AuditReport:
    inputs = open_inputs(section, prefers_chat=False)
    rows, bad, _ = survey_rows(section, inputs, encoder=Encoder(tokenizer), chat=None)
    return audit_rows(rows, bad=bad, max_seq_tokens=section.max_seq_tokens)


def _write(path: Path, *, count: int, words: int) -> Path:
    """Rows of other words each, of which every tenth is nearly that before it, and every 25th has no answer."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(f"w{number - (number % 10 == 9)}x{at}" for at in range(words)) + f" {number}"
            row = {"instruction": "What is it?", "response": "" if number % 25 == 0 else text}
            file.write(json.dumps(row) + "\n")
    return path


def test_sides_are_those_of_training_and_places_are_told(tmp_path: Path, tokenizer: Any) -> None:
    path = _write(tmp_path / "rows.jsonl", count=100, words=30)
    section = _section(path, eval_fraction=0.2)
    report = _audit(section, tokenizer)
    examples = read_examples(section, open_inputs(section, prefers_chat=False), chat=None)
    assert (report.train_rows, report.eval_rows, report.bad_rows) == (len(examples.train), len(examples.eval), 4)
    found = {finding.kind: finding for finding in report.findings}
    assert found["duplicate_near"].count + found["leak_near"].count == 10
    assert found["empty_answer"].places == "rows.jsonl: 1, 26, 51, 76"


@pytest.mark.parametrize("way", ["audit", "near duplicates"])
def test_rows_are_not_held_in_memory(way: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times the rows, 0.4 MB and 2 MB of text: the same memory but for 1 kB a row."""
    # What is kept at once is reached by the fewer rows already.
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(duplicates, "_BATCH_WORDS", 5_000)
    monkeypatch.setattr(duplicates, "_KEPT_ROWS", 4)
    peaks = []
    for count in (10, 100, 500):
        section = _section(
            _write(tmp_path / f"{count}.jsonl", count=count, words=500), clean={"drop_duplicates": "near"}
        )
        tracemalloc.start()
        if way == "audit":
            assert _audit(section, tokenizer).rows >= 0.9 * count
        else:
            examples = read_examples(section, open_inputs(section, prefers_chat=False), chat=None)
            assert 0.75 * count < len(examples.train) + len(examples.eval) < 0.9 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 400 * 1_000, peaks
