from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data import sources
from gemma_tune.data.sources import load_source
from gemma_tune.errors import DataError

ROWS: list[dict[str, object]] = [
    {"instruction": "Name a river.", "response": "The Elm."},
    {"instruction": 'Say "hello, Wörld"', "response": "hello,\nWörld\u2028!"},
]


def write(path: Path, text: str, *, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def as_jsonl(path: Path) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))


def as_json(path: Path) -> None:
    write(path, json.dumps(ROWS, ensure_ascii=False, indent=1))


def as_delimited(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "save", "places"),
    [
        ("rows.jsonl", as_jsonl, ["rows.jsonl:1", "rows.jsonl:2"]),
        ("rows.json", as_json, ["rows.json:2", "rows.json:6"]),
        ("rows.csv", as_delimited, ["rows.csv:2", "rows.csv:3"]),
        ("rows.tsv", as_delimited, ["rows.tsv:2", "rows.tsv:3"]),
        ("rows.parquet", as_parquet, ["rows.parquet[0]", "rows.parquet[1]"]),
    ],
)
def test_each_format_gives_the_same_rows(tmp_path: Path, name: str, save: Any, places: list[str]) -> None:
    path = tmp_path / name
    save(path)
    plain = load_source(str(path))
    assert [row.fields for row in plain.rows] == ROWS
    assert [row.where for row in plain.rows] == places
    assert plain.columns == ("instruction", "response")
    assert plain.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    again = load_source(str(packed))
    assert [row.fields for row in again.rows] == ROWS
    assert again.sha256 == plain.sha256


def test_csv_rows_know_the_line_where_they_start(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a,b\n"one\ntwo\nthree",1\n\nfour,2\n')
    assert [(row.fields["a"], row.where) for row in load_source(str(path)).rows] == [
        ("one\ntwo\nthree", "rows.csv:2"),
        ("four", "rows.csv:6"),
    ]


def test_csv_cell_longer_than_the_standard_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "a\n" + "x" * 200_000 + "\n")
    assert len(str(load_source(str(path)).rows[0].fields["a"])) == 200_000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bom_windows_line_ends_and_blank_lines(tmp_path: Path, name: str) -> None:
    text = '{"a": "x"}\r\n\r\n{"a": "y"}\r\n' if name.endswith("jsonl") else "a\r\nx\r\n\r\ny\r\n"
    path = write(tmp_path / name, text, encoding="utf-8-sig")
    assert [row.fields for row in load_source(str(path)).rows] == [{"a": "x"}, {"a": "y"}]


def test_every_broken_line_is_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    broken = ["{", "[1]", '"text"', "null", "3", "true", '{"a": 1,}', "{'a': 1}", '{"a": 1} {"b": 2}', "[" * 100_000]
    path = write(tmp_path / "rows.jsonl", "\n".join(['{"a": "good"}', *broken]))
    with pytest.raises(DataError) as caught:
        load_source(str(path))
    lines = caught.value.message.splitlines()
    assert lines[0] == "rows.jsonl: 10 broken lines"
    assert lines[1].startswith("  rows.jsonl:2:2: not JSON")
    assert lines[2] == "  rows.jsonl:3: a list, not an object"
    assert lines[-1] == "  and 5 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}\n {"a": 2}]', "rows.json:2:2: not JSON: Expecting ',' or ']'"),
        ('[\n{"a": 1},\n{"a" 2}]', "rows.json:3:6: not JSON: Expecting ':' delimiter"),
        ('[{"a": 1},]', "rows.json:1:11: not JSON: Expecting value"),
        ('[{"a": 1}', "rows.json:1:10: not JSON: Expecting ',' or ']'"),
        ('[{"a": 1}] x', "rows.json:1:12: not JSON: Extra data behind the list"),
        ('{"a": 1}\n{"a": 2}', "rows.json:1:1: not JSON: Expecting '[', the start of a list"),
        ('[{"a": 1},\n\n 7]', "rows.json: 1 broken line\n  rows.json:3: a number, not an object"),
        ("[" * 100_000, "rows.json: nested too deeply"),
    ],
)
def test_broken_json_is_placed(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        load_source(str(write(tmp_path / "rows.json", text)))
    assert caught.value.message == expected


def test_json_lines_in_a_json_file_are_told_their_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_source(str(write(tmp_path / "rows.json", '{"a": 1}\n{"a": 2}')))
    assert caught.value.hint is not None and "name it .jsonl" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1\n1,2,3\n1,2\n", "rows.csv: 2 broken lines\n  rows.csv:2: 1 cells where the header has 2"),
        ("a,a\n1,2\n", "rows.csv:1: two columns are called 'a'"),
        ("a,\n1,2\n", "rows.csv:1: a column has no name"),
        ('a,b\n1,"2\n', "rows.csv: 1 broken line\n  rows.csv:2: unexpected end of data"),
        ("a,b\n", "holds no rows"),
    ],
)
def test_broken_csv_is_placed(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        load_source(str(write(tmp_path / "rows.csv", text)))
    assert expected in caught.value.message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_wrong_encoding_is_placed(tmp_path: Path, name: str) -> None:
    text = {"rows.jsonl": '{"a": "x"}\n{"a": "é"}', "rows.json": '[\n{"a": "é"}]', "rows.csv": "a\né\n"}[name]
    with pytest.raises(DataError) as caught:
        load_source(str(write(tmp_path / name, text, encoding="cp1252")))
    assert caught.value.message == f"{name}:2: not UTF-8 (byte 0xe9)"


def test_utf16_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_source(str(write(tmp_path / "rows.jsonl", '{"a": "x"}', encoding="utf-16")))
    assert caught.value.hint is not None and "iconv -f UTF-16" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b" \n\n"), "is empty"),
        (lambda path: path.mkdir(), "is a directory"),
    ],
)
def test_no_file_to_read(tmp_path: Path, make: Any, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    make(path)
    with pytest.raises(DataError, match=expected):
        load_source(str(path))


def test_a_near_file_is_named(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(DataError) as caught:
        load_source(str(tmp_path / "row.jsonl"))
    assert caught.value.hint == "did you mean 'rows.jsonl'?"


def test_unknown_kinds_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown kind of file"):
        load_source(str(write(tmp_path / "rows.txt", "x")))
    with pytest.raises(DataError, match="not a whole gzip file"):
        load_source(str(write(tmp_path / "rows.jsonl.gz", "x")))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": "' + bytes(range(1, 255)) * 50)[:-20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        load_source(str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(DataError, match="not a whole parquet file"):
        load_source(str(write(tmp_path / "rows.parquet", "PAR1 and no more")))
    with pytest.raises(DataError, match="no such data source: nonsense"):
        load_source("nonsense")


def test_hub_settings_are_refused_for_files(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "rows.jsonl")
    for settings in ({"subset": "x"}, {"revision": "main"}, {"split": "test"}):
        with pytest.raises(DataError, match=f"has no {next(iter(settings))}"):
            load_source(str(tmp_path / "rows.jsonl"), **settings)


def test_tiny_world_has_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "eval"):
        write(tmp_path / f"{split}.jsonl", json.dumps({"instruction": split}))
    monkeypatch.setattr(sources, "TINY_ROWS_DIR", tmp_path)
    assert load_source("tiny-world").rows[0].fields == {"instruction": "train"}
    assert load_source("tiny-world", split="eval").label == "tiny-world[eval]"
    with pytest.raises(DataError, match="no split 'test'"):
        load_source("tiny-world", split="test")


def test_hub_rows_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load_dataset(path: str, **settings: object) -> datasets.Dataset:
        asked.update(settings, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_source("owner/rows", subset="en", split="train", revision="abc")
    assert asked == {"path": "owner/rows", "name": "en", "split": "train", "revision": "abc"}
    assert [row.fields for row in loaded.rows] == ROWS
    assert loaded.rows[1].where == "owner/rows[train]:1"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ConnectionError("Couldn't reach 'owner/rows' on the Hub (LocalEntryNotFoundError)"),
            "the hub cannot be reached",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/rows' doesn't exist"), "not found"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/rows' is a gated dataset on the Hub."),
            "it is gated",
        ),
        (ValueError("Unknown split \"tran\". Should be one of ['train']."), "Unknown split"),
        (RuntimeError("something else"), "something else"),
    ],
)
def test_hub_errors_are_told_in_words(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def load_dataset(*args: object, **settings: object) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=expected) as caught:
        load_source("owner/rows")
    assert caught.value.hint
