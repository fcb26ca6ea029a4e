"""Rows of a recipe without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.data.look.count import count_rows, count_train_rows
from gemma_tune.recipe.schema import DataSection


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {index} of {path.name}", "response": "x" * 400} for index in range(count)]


def test_rows_of_every_plain_kind_of_file(tmp_path: Path) -> None:
    rows = _rows(tmp_path, 25)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    csv = tmp_path / "rows.csv"
    csv.write_text("instruction,response\n" + "".join(f"{row['instruction']},{row['response']}\n" for row in rows))
    for path in (jsonl, array, csv):
        counted = count_rows(str(path))
        assert counted.rows == 25, path
        assert counted.mean_tokens == pytest.approx(100, rel=0.25)
    assert count_rows(f"{jsonl}#7").rows == 7
    assert count_rows(f"{jsonl}#7").mean_tokens == count_rows(str(jsonl)).mean_tokens


def test_dolly_has_its_published_count() -> None:
    counted = count_rows("databricks/databricks-dolly-15k")
    assert counted.rows == 15_011
    assert counted.mean_tokens is not None and 150 < counted.mean_tokens < 250


@pytest.mark.parametrize("content", ["", "not json", "{}", "[]"])
def test_what_has_no_rows_is_not_known(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert count_rows(str(path)).rows is None
    assert count_rows("owner/some-dataset").rows is None
    assert count_rows(str(tmp_path / "missing.jsonl")).rows is None


def test_rows_that_are_held_out_or_left_out_are_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(tmp_path, 40)))

    def count(source: str | None = str(path), **settings: object) -> int | None:
        return count_train_rows(DataSection.model_validate({"source": source, "max_seq_tokens": 64, **settings})).rows

    assert count(eval_fraction=0.1) == 36
    assert count(eval_fraction=0.0) == 40
    assert count(eval_fraction=0.1, eval_source=str(path)) == 40
    assert count(f"{path}#7", eval_fraction=0.1) == 7
    assert count(eval_fraction=0.1, max_train_rows=5) == 5
    assert count("tiny-world", eval_fraction=0.1) == count("tiny-world", eval_fraction=0.0)
    assert count("tiny-world#3") == 3
    assert count(None, mix=[{"source": str(path)}, {"source": f"{path}#10"}], eval_fraction=0.1) == 45
    assert count("owner/some-dataset", eval_fraction=0.1) is None
