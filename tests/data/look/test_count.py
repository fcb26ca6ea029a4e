"""Rows of a recipe without a tokenizer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from gemma_tune.data.look import count
from gemma_tune.data.look.count import count_rows, count_train_rows
from gemma_tune.errors import DataError
from gemma_tune.recipe.schema import DataSection


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {index} of {path.name}", "response": "x" * 400} for index in range(count)]


def test_rows_of_every_plain_kind_of_file(tmp_path: Path) -> None:
    rows = _rows(tmp_path, 25)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    table = tmp_path / "rows.csv"
    table.write_text("instruction,response\n" + "".join(f"{row['instruction']},{row['response']}\n" for row in rows))
    for path in (jsonl, array, table):
        counted = count_rows(str(path))
        assert counted.rows == 25, path
        assert counted.mean_tokens == pytest.approx(100, rel=0.25)
    assert count_rows(f"{jsonl}#7").rows == 7
    assert count_rows(f"{jsonl}#7").mean_tokens == count_rows(str(jsonl)).mean_tokens


def test_dolly_has_its_published_count() -> None:
    counted = count_rows("databricks/databricks-dolly-15k")
    assert counted.rows == 15_011
    assert counted.mean_tokens is not None and 150 < counted.mean_tokens < 250


@pytest.mark.parametrize(
    ("content", "told"), [("", "is empty"), ("not json", "not JSON"), ("{}", "one object"), ("[]", "is empty")]
)
def test_what_holds_no_rows_is_refused_as_in_a_training(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        count_rows(str(path))


def test_what_is_not_here_is_not_known(tmp_path: Path) -> None:
    assert count_rows("owner/some-dataset").rows is None
    assert count_rows(str(tmp_path / "missing.jsonl")).rows is None
    assert count_rows(str(tmp_path / "missing-*.jsonl")).rows is None


@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
def test_records_of_csv_are_counted_and_not_lines(tmp_path: Path, lineterminator: str) -> None:
    path = tmp_path / "tickets.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=lineterminator)
        writer.writerow(["instruction", "response"])
        writer.writerows([f"The {index}th\nline,\n\nand one", "An\r\nanswer"] for index in range(240))
    assert count_rows(str(path)).rows == 240
    path.write_text("instruction,response\n1,2,3\n")
    with pytest.raises(DataError, match=r"tickets\.csv: 1 broken line"):
        count_rows(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_large_files_are_estimated_and_said_to_be(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [{"instruction": f"question {index:05}", "response": "line\n" * (index % 7)} for index in range(20_000)]
    with path.open("w", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    exact = count_rows(str(path))
    assert exact.rows == 20_000 and exact.source == f"{path.name}: counted"
    monkeypatch.setattr(count, "MAX_COUNTED_BYTES", 100_000)
    monkeypatch.setattr(count, "SAMPLE_BYTES", 100_000)
    count._count_local.cache_clear()
    estimated = count_rows(str(path))
    assert estimated.rows == pytest.approx(20_000, rel=0.02) and "estimated" in estimated.source
    assert estimated.mean_tokens == pytest.approx(exact.mean_tokens, rel=0.02)


def test_several_files_and_other_kinds_are_counted(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(tmp_path, 10)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows(tmp_path, 30)), tmp_path / "rows.parquet")
    assert count_rows(f"{tmp_path}/part-*.jsonl").rows == 20
    assert count_rows(str(tmp_path / "rows.parquet")).rows == 30


def test_a_name_with_a_number_sign_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows#5.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(tmp_path, 8)))
    assert count_rows(str(path)).rows == 8
    assert count_rows(f"{path}#3").rows == 3


def test_rows_that_are_held_out_or_left_out_are_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(tmp_path, 40)))

    def trained(source: str | None = str(path), **settings: object) -> int | None:
        return count_train_rows(DataSection.model_validate({"source": source, "max_seq_tokens": 64, **settings})).rows

    assert trained(eval_fraction=0.1) == 36
    assert trained(eval_fraction=0.0) == 40
    assert trained(eval_fraction=0.1, eval_source=str(path)) == 40
    assert trained(f"{path}#7", eval_fraction=0.1) == 7
    assert trained(eval_fraction=0.1, max_train_rows=5) == 5
    assert trained("tiny-world", eval_fraction=0.1) == trained("tiny-world", eval_fraction=0.0)
    assert trained("tiny-world#3") == 3
    assert trained(None, mix=[{"source": str(path)}, {"source": f"{path}#10"}], eval_fraction=0.1) == 45
    assert trained("owner/some-dataset", eval_fraction=0.1) is None
