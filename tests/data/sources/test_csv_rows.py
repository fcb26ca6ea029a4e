"""Files of cells as programs write them; Python's csv module and pandas are the oracles."""

from __future__ import annotations

import csv
import io
import subprocess
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.sources.source import BrokenLine, SourceRow, open_source, read_whole
from gemma_tune.errors import DataError

QUESTIONS = [{"question": f"Where is {name}?", "answer": f'In the {name}; "there".'} for name in ("Ärmel", "barn")]


def fields(path: Path) -> list[dict[str, object]]:
    return [row.fields for row in read_whole(open_source(str(path)))]


def saved(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path: Path, delimiter: str, end: str, encoding: str, suffix: str) -> None:
    made = io.StringIO(newline="")
    writer = csv.DictWriter(made, ["question", "answer"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(QUESTIONS)
    path = saved(tmp_path / f"rows{suffix}", made.getvalue(), encoding)
    assert fields(path) == QUESTIONS
    saved(path, f"sep={delimiter}{end}{made.getvalue()}", encoding)
    assert fields(path) == QUESTIONS
    assert [row.where for row in read_whole(open_source(str(path)))] == [f"{path.name}:3", f"{path.name}:4"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The header has one column; what stands in the cells does not make it two.
        ('text\n"one, two; three"\n"a|b"\n', [{"text": "one, two; three"}, {"text": "a|b"}]),
        ("text\none; two\nthree\n", [{"text": "one; two"}, {"text": "three"}]),
        # Two delimiters in the header: that which cuts the rows as well.
        ("name; first,age\nAnn,3\nBen,4\n", [{"name; first": "Ann", "age": "3"}, {"name; first": "Ben", "age": "4"}]),
        ("a, long;b\n1;2\n3;4\n", [{"a, long": "1", "b": "2"}, {"a, long": "3", "b": "4"}]),
        ("a;b\n1,5;2\n3,5;4\n", [{"a": "1,5", "b": "2"}, {"a": "3,5", "b": "4"}]),
        ("a|b\n", None),
        ("sep=~\na~b\n1~2\n", [{"a": "1", "b": "2"}]),
        ('"sep=;"\r\na;b\r\n1;2\r\n', [{"a": "1", "b": "2"}]),
        ('a, b\n1, "2, and 3"\n', [{"a": "1", "b": "2, and 3"}]),
    ],
)
def test_where_delimiters_compete(tmp_path: Path, text: str, expected: list[dict[str, str]] | None) -> None:
    path = saved(tmp_path / "rows.csv", text)
    if expected is None:
        with pytest.raises(DataError, match="holds no rows"):
            open_source(str(path))
    else:
        assert fields(path) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a,b,,\n1,2,,\n,,,\n3,4,,\n,,,\n",  # columns and rows that were in use once
        "a,b\n1,2,,\n3,4,\n\n",
        ",,\na,b,\n1,2,\n3,4,\n",  # an empty row above the table
        "a;b;;\r\n1;2;;\r\n3;4;;\r\n;;;\r\n",
    ],
)
def test_what_excel_leaves_empty_is_left_out(tmp_path: Path, text: str) -> None:
    assert fields(saved(tmp_path / "rows.csv", text)) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b,\n1,2,x\n", "a cell in column 3, which has no name in the header"),
        ("a,b\n1,2,,x\n", "4 cells where the header has 2"),
        ("a,b,\n1\n", "1 cell where the header has 3"),
    ],
)
def test_a_cell_without_a_column_is_a_broken_line(tmp_path: Path, text: str, problem: str) -> None:
    assert list(open_source(str(saved(tmp_path / "rows.csv", text))).rows()) == [BrokenLine("rows.csv:2", problem)]


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "Unnamed: 0.1"])
def test_the_index_of_pandas_is_left_out_and_said_once(tmp_path: Path, name: str) -> None:
    source = open_source(str(saved(tmp_path / "rows.csv", f"{name},a\n0,x\n1,y\n")))
    assert [row.fields for row in read_whole(source)] == [{"a": "x"}, {"a": "y"}]
    assert source.columns == ("a",)
    assert source.notes == (f"rows.csv: the first column, {name or 'without a name'}, is an index and is not read",)


@pytest.mark.parametrize("options", [{}, {"index": False}, {"sep": ";"}, {"sep": "\t", "quoting": csv.QUOTE_ALL}])
def test_what_pandas_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    pandas.DataFrame(QUESTIONS).to_csv(tmp_path / "rows.csv", **options)
    assert fields(tmp_path / "rows.csv") == QUESTIONS
    again = pandas.read_csv(tmp_path / "rows.csv", sep=options.get("sep", ","))
    again.to_csv(tmp_path / "rows.csv")  # now with two index columns, one of them named
    assert [{name: row[name] for name in ("question", "answer")} for row in fields(tmp_path / "rows.csv")] == QUESTIONS


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_the_hint_for_another_encoding_works_as_typed(tmp_path: Path, packed: str) -> None:
    folder = tmp_path / "my rows"
    folder.mkdir()
    path = saved(folder / "rows.csv", "question;answer\nWo?;Über dem Fluß\n", "cp1252")
    if packed:
        subprocess.run(["gzip", str(path)], check=True)
        path = folder / "rows.csv.gz"
    with pytest.raises(DataError, match=r"rows\.csv\S*:2: not UTF-8 \(byte 0xdc\)") as caught:
        read_whole(open_source(str(path)))
    assert caught.value.hint is not None
    subprocess.run(["sh", "-c", caught.value.hint.partition(": ")[2]], check=True)
    assert fields(folder / "utf8-rows.csv") == [{"question": "Wo?", "answer": "Über dem Fluß"}]


CELL = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
NAME = st.text("abcßé_ 7", min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    names=st.lists(NAME, min_size=2, max_size=4, unique=True),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    padding=st.integers(0, 2),
)
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    names: list[str],
    delimiter: str,
    quoting: Any,
    encoding: str,
    padding: int,
) -> None:
    rows = data.draw(st.lists(st.lists(CELL, min_size=len(names), max_size=len(names)), min_size=1, max_size=8))
    made = io.StringIO(newline="")
    # With \r\n at the end of lines the module quotes every cell with one of the two.
    writer = csv.writer(made, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writerow(names + [""] * padding)
    writer.writerows(row + [""] * padding for row in rows)
    path = saved(tmp_path_factory.mktemp("csv") / "rows.csv", made.getvalue(), encoding)
    expected = [dict(zip(names, row, strict=True)) for row in rows if any(row)]
    if expected:
        source = open_source(str(path))
        assert [item.fields for item in source.rows() if isinstance(item, SourceRow)] == expected
        ends = [int(row.where.partition(":")[2]) for row in read_whole(source)]
        lines = made.getvalue().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert ends == sorted(set(ends)) and all(0 < end <= len(lines) for end in ends)
