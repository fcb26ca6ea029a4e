from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data.sources import source as sources
from gemma_tune.data.sources.source import BrokenLine, Source, SourceRow, open_source
from gemma_tune.errors import DataError

ROWS: list[dict[str, object]] = [
    {"instruction": "Name a river.", "response": "The Elm."},
    {"instruction": 'Say "hello, Wörld"', "response": "hello,\nWörld\u2028!"},
]


def rows_of(source: Source) -> list[SourceRow]:
    """The rows of a source that must have no broken line."""
    items = list(source.rows())
    rows = [item for item in items if isinstance(item, SourceRow)]
    assert len(rows) == len(items)
    return rows


def broken_of(path: Path) -> list[tuple[str, str]]:
    """The broken lines of a file, as messages show them."""
    return [(item.where, item.problem) for item in open_source(str(path)).rows() if isinstance(item, BrokenLine)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
KIND = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


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
    plain = open_source(str(path))
    assert [row.fields for row in rows_of(plain)] == ROWS
    assert [row.where for row in rows_of(plain)] == places  # a second pass gives the same
    assert plain.columns == ("instruction", "response")
    assert plain.label == name
    assert plain.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("name", "save"),
    [("rows.jsonl", as_jsonl), ("rows.json", as_json), ("rows.tsv", as_delimited), ("rows.parquet", as_parquet)],
)
def test_each_format_can_be_compressed(tmp_path: Path, name: str, save: Any, suffix: str) -> None:
    save(tmp_path / name)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(PACK[suffix]((tmp_path / name).read_bytes()))
    source = open_source(str(packed))
    assert [row.fields for row in rows_of(source)] == ROWS
    assert rows_of(source)[0].where.startswith(packed.name)
    assert source.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_of_several_parts_and_cut_ones(tmp_path: Path, suffix: str) -> None:
    content = b"".join(b'{"a": %d}\n' % number for number in range(50_000))
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(PACK[suffix](content) * 2)
    assert len(rows_of(open_source(str(path)))) == 100_000
    path.write_bytes(PACK[suffix](content)[:-9])
    with pytest.raises(DataError, match=f"rows.jsonl{suffix} is not a whole {KIND[suffix]} file"):
        list(open_source(str(path)).rows())


def test_columns_are_those_of_the_first_thousand_rows(tmp_path: Path) -> None:
    rows = [{"b": 1}, {"a": 2, "b": 3}, *[{"b": 4}] * 998, {"late": 5}]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert open_source(str(path)).columns == ("b", "a")


def test_csv_rows_know_the_line_where_they_start(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a,b\n"one\ntwo\nthree",1\n\nfour,2\n')
    assert [(row.fields["a"], row.where) for row in rows_of(open_source(str(path)))] == [
        ("one\ntwo\nthree", "rows.csv:2"),
        ("four", "rows.csv:6"),
    ]


def test_csv_cell_longer_than_the_standard_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "a\n" + "x" * 200_000 + "\n")
    assert len(str(rows_of(open_source(str(path)))[0].fields["a"])) == 200_000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bom_windows_line_ends_and_blank_lines(tmp_path: Path, name: str) -> None:
    text = '{"a": "x"}\r\n\r\n{"a": "y"}\r\n' if name.endswith("jsonl") else "a\r\nx\r\n\r\ny\r\n"
    path = write(tmp_path / name, text, encoding="utf-8-sig")
    assert [row.fields for row in rows_of(open_source(str(path)))] == [{"a": "x"}, {"a": "y"}]
    assert open_source(str(path)).columns == ("a",)


@pytest.mark.parametrize(("name", "text"), [("rows.json", '[{"a": "x"}]'), ("rows.tsv", "a\tb\nx\t1\n")])
def test_bom_elsewhere(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text, encoding="utf-8-sig")
    assert open_source(str(path)).columns[0] == "a"


def test_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a,b\r1,"x\ry"\r2,z\r')
    assert [(row.fields["b"], row.where) for row in rows_of(open_source(str(path)))] == [
        ("x\ry", "rows.csv:2"),
        ("z", "rows.csv:4"),
    ]
    path = write(tmp_path / "rows.jsonl", '{"a":\r1}\n{"a": "\u2028\u0085\x7f"}\n')
    assert [row.fields["a"] for row in rows_of(open_source(str(path)))] == [1, "\u2028\u0085\x7f"]


def test_every_broken_line_is_given_and_reading_goes_on(tmp_path: Path) -> None:
    broken: list[tuple[bytes, str, str]] = [
        (b"{", ":2", "not JSON: Expecting property name enclosed in double quotes"),
        (b"[1]", "", "a list, not an object"),
        (b'"text"', "", "text, not an object"),
        (b"null", "", "null, not an object"),
        (b"3", "", "a number, not an object"),
        (b"true", "", "a truth value, not an object"),
        (b"{'a': 1}", ":2", "not JSON: Expecting property name enclosed in double quotes"),
        (b'{"a": 1} {"b": 2}', ":10", "not JSON: Extra data"),
        (b"[" * 100_000, "", "nested too deeply"),
        (b'{"a": "x', ":7", "not JSON: Unterminated string starting at"),
        ('{"a": "é"}'.encode("cp1252"), "", "not UTF-8 (byte 0xe9)"),
        (b'{"a": 1, "b": 2, "a": 1}', "", "key 'a' twice"),
        (b'{"a": [{"b": 1, "b": 2}]}', "", "key 'b' twice"),
        (b'{"a": "\\ud83d"}', "", "half of a character (\\ud83d without its partner)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "", "a number of too many digits"),
        (b"\0\0\0", ":1", "not JSON: Expecting value"),
    ]
    good = b'{"a": "good"}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, *(line + b"\r\n" + good for line, _, _ in broken)]))
    items = list(open_source(str(path)).rows())
    assert items[::2] == [SourceRow({"a": "good"}, f"rows.jsonl:{2 * n + 1}") for n in range(len(broken) + 1)]
    assert items[1::2] == [
        BrokenLine(f"rows.jsonl:{2 * n + 2}{column}", problem) for n, (_, column, problem) in enumerate(broken)
    ]


def test_unusual_values_are_values(tmp_path: Path) -> None:
    text = '{"a": NaN, "b": -Infinity, "c": "\\ud83d\\ude00 \\\\ud83d", "d": {"a": 1}, "e": {}}\n{}'
    first, second = rows_of(open_source(str(write(tmp_path / "rows.jsonl", text))))
    assert first.fields["b"] == -float("inf") and first.fields["c"] == "😀 \\ud83d"
    assert second.fields == {}


def test_a_file_of_broken_lines_only_is_a_source(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "x\ny\n")
    assert open_source(str(path)).columns == ()
    assert len(broken_of(path)) == 2


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ('[{"a": 1}\n {"a": 2}]', "rows.json:2:2", "not JSON: Expecting ',' or ']'; reading stopped here"),
        ('[\n{"a": 1},\n{"a" 2}]', "rows.json:3:6", "not JSON: Expecting ':' delimiter; reading stopped here"),
        ('[{"a": 1},]', "rows.json:1:11", "not JSON: Expecting value; reading stopped here"),
        ('[{"a": 1}', "rows.json:1:10", "not JSON: Expecting ',' or ']'; reading stopped here"),
        ('[{"a": 1}] x', "rows.json:1:12", "not JSON: Extra data behind the list; reading stopped here"),
        ('"text"', "rows.json:1:1", "not JSON: Expecting '[', the start of a list; reading stopped here"),
        ('[{"a": 1},\n\n 7]', "rows.json:3", "a number, not an object"),
        ('[{"a": 1},\n\n {"b": 1,\n "b": 2}]', "rows.json:3", "key 'b' twice"),
        ("[" * 100_000, "rows.json:1:2", "not JSON: nested too deeply; reading stopped here"),
    ],
)
def test_broken_json_is_placed(tmp_path: Path, text: str, where: str, problem: str) -> None:
    items = list(open_source(str(write(tmp_path / "rows.json", text))).rows())
    is_end = problem.endswith("reading stopped here")
    assert items[-1] == BrokenLine(where, problem, ends_reading=is_end)
    assert all(item == SourceRow({"a": 1}, item.where) for item in items[:-1])


def test_json_goes_on_behind_an_item_that_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '[7,\n{"a": 1, "a": 1},\n{"a":\n"é"},\n{"a": "end"}]', encoding="cp1252")
    assert list(open_source(str(path)).rows()) == [
        BrokenLine("rows.json:1", "a number, not an object"),
        BrokenLine("rows.json:2", "key 'a' twice"),
        BrokenLine("rows.json:4", "not UTF-8 (byte 0xe9)"),
        SourceRow({"a": "end"}, "rows.json:5"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "told", "hint"),
    [
        ("rows.json", '{"a": 1}\n{"a": 2}', "one object a line", "name it .jsonl"),
        ("rows.json", '{\n"a": 1}\n{\n"a": 2}', "one object behind the other", "one list of objects"),
        (
            "rows.json",
            '{"v": 1, "d": {"rows": [{"a": 1}]}}',
            "the rows deeper down, in d.rows",
            """jq '.["d"]["rows"]'""",
        ),
        ("rows.json", '{"a": ["x"], "b": ["y", "z"]}', "one object with the lists 'a', 'b'", """jq '.["a"]'"""),
        ("rows.json", '{"a": "x"}', "is one object, not a list of objects", "one list of objects"),
        ("rows.json", '{"a": "x"', "rows.json:1:10: not JSON", "one list of objects"),
        ("rows.jsonl", '[\n{"a": 1},\n{"a": 2}\n]\n', "one JSON list", "name it .json instead"),
        ("rows.jsonl", '\n[{"a": 1},\n{"a": 2}]', "one JSON list", "name it .json instead"),
        ("rows.jsonl", '[{"a": 1}, {"a": 2}]\n', "one JSON list", "name it .json instead"),
    ],
)
def test_json_of_another_form_is_told(tmp_path: Path, name: str, text: str, told: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(str(write(tmp_path / name, text)))
    assert told in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_first_line_that_is_a_list_is_one_broken_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '[{"a": 1}]\n{"a": 2}\n')
    assert broken_of(path) == [("rows.jsonl:1", "a list, not an object")]


def test_broken_csv_is_placed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a,b\n1\n1,2,3\n1,"x\ny"\n1\n')
    assert list(open_source(str(path)).rows()) == [
        BrokenLine("rows.csv:2", "1 cell where the header has 2"),
        BrokenLine("rows.csv:3", "3 cells where the header has 2"),
        SourceRow({"a": "1", "b": "x\ny"}, "rows.csv:4"),
        BrokenLine("rows.csv:6", "1 cell where the header has 2"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [('a,b\n1,2\n1,"2\n3,4\n', "unexpected end of data"), ('a,b\n1,2\n1,"2" x\n3,4\n', "',' expected after")],
)
def test_a_misplaced_quote_ends_the_reading_of_a_csv_file(tmp_path: Path, text: str, problem: str) -> None:
    row, broken = open_source(str(write(tmp_path / "rows.csv", text))).rows()
    assert row == SourceRow({"a": "1", "b": "2"}, "rows.csv:2")
    assert isinstance(broken, BrokenLine) and broken.ends_reading and broken.where == "rows.csv:3"
    assert broken.problem.startswith(problem) and broken.problem.endswith("reading stopped here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,a\n1,2\n", "rows.csv:1: two columns are called 'a'"),
        ('"a",b,a\n1,2,3\n', "rows.csv:1: two columns are called 'a'"),
        ("a,é\n1,2\n", "rows.csv:1: not UTF-8 (byte 0xe9)"),
        ("a,b\n", "holds no rows"),
    ],
)
def test_a_csv_header_that_names_no_columns(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(str(write(tmp_path / "rows.csv", text, encoding="cp1252")))
    assert expected in caught.value.message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_wrong_encoding_is_placed_and_the_rest_is_read(tmp_path: Path, name: str) -> None:
    text = {
        "rows.jsonl": '{"a": "x"}\n{"a": "é"}\n{"a": "z"}',
        "rows.json": '[{"a": "x"},\n{"a": "é"},\n{"a": "z"}]',
        "rows.csv": 'a\n"é\nx"\nz\n',
    }[name]
    path = write(tmp_path / name, text, encoding="cp1252")
    assert broken_of(path) == [(f"{name}:2", "not UTF-8 (byte 0xe9)")]
    *_, last = open_source(str(path)).rows()
    assert isinstance(last, SourceRow) and last.fields == {"a": "z"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", '{"a": "x"}'), ("rows.csv", "a,b\n1,2\n")])
def test_utf16_is_recognised(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(str(write(tmp_path / name, text, encoding=encoding)))
    assert caught.value.hint is not None and "iconv -f UTF-16" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b" \n\n"), "is empty"),
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "is not a regular file"),
    ],
)
def test_no_file_to_read(tmp_path: Path, make: Any, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    make(path)
    with pytest.raises(DataError, match=expected):
        open_source(str(path))


def test_a_near_file_is_named(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "row.jsonl"))
    assert caught.value.hint == "did you mean 'rows.jsonl'?"


def test_unknown_kinds_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown kind of file"):
        open_source(str(write(tmp_path / "rows.txt", "x")))
    with pytest.raises(DataError, match="not a whole gzip file"):
        open_source(str(write(tmp_path / "rows.jsonl.gz", "x")))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": "' + bytes(range(1, 255)) * 50)[:-20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        open_source(str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(DataError, match="not a whole parquet file"):
        open_source(str(write(tmp_path / "rows.parquet", "PAR1 and no more")))
    with pytest.raises(DataError, match="no such data source: nonsense"):
        open_source("nonsense")
    with pytest.raises(DataError, match="is a web address"):
        open_source("https://example.com/rows.jsonl?download=true")
    with pytest.raises(DataError, match=r"cannot read .*: File name too long"):
        open_source(f"{'x' * 300}.jsonl")


LINE = b'{"a": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "told", "hint"),
    [
        ("rows.jsonl", gzip.compress(LINE, mtime=0), "it is compressed with gzip", "rows.jsonl.gz"),
        ("rows.csv", zstd(LINE), "it is compressed with zstd", "rows.csv.zst"),
        ("rows.jsonl.gz", LINE, "it is not compressed", "name it rows.jsonl"),
        ("rows.jsonl.gz", lzma.compress(LINE), "it is compressed with xz", "rows.jsonl.xz"),
        (
            "rows.jsonl.gz",
            gzip.compress(bz2.compress(LINE), mtime=0),
            "compressed twice, with bzip2 inside",
            "unpack it once",
        ),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", "git lfs pull"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", "git lfs pull"),
        ("rows.csv", b"\n<!DOCTYPE html>\n<html>", "a web page", "download the file itself"),
        ("rows.csv", b"PK\x03\x04" + bytes(40), "a zip archive", "unpack it"),
        ("rows.jsonl", b"PAR1\x15\x04\x15", "a parquet file", "end in .parquet"),
    ],
)
def test_a_mislabelled_file_is_told(tmp_path: Path, name: str, content: bytes, told: str, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / name))
    assert told in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_file_that_changes_is_not_read_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\n')
    source = open_source(str(path))
    write(path, '{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match="was changed while it was being read"):
        list(source.rows())


def test_parquet_text_that_is_not_utf8_and_double_columns(tmp_path: Path) -> None:
    offsets, letters = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"x\xe9z")
    column = pyarrow.StringArray.from_buffers(3, offsets, letters)
    pyarrow.parquet.write_table(pyarrow.table([column], names=["a"]), tmp_path / "rows.parquet")
    assert list(open_source(str(tmp_path / "rows.parquet")).rows()) == [
        SourceRow({"a": "x"}, "rows.parquet[0]"),
        BrokenLine("rows.parquet[1]", "not UTF-8 (byte 0xe9)"),
        SourceRow({"a": "z"}, "rows.parquet[2]"),
    ]
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="two columns are called 'a'"):
        open_source(str(tmp_path / "rows.parquet"))


def test_parquet_rows_are_numbered_through_batches_and_row_groups(tmp_path: Path) -> None:
    table = pyarrow.table({"a": list(range(2500))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=700)
    rows = rows_of(open_source(str(tmp_path / "rows.parquet")))
    assert [row.fields["a"] for row in rows] == list(range(2500))
    assert rows[-1].where == "rows.parquet[2499]"


# --- several files ----------------------------------------------------------------------------------------------------


def test_several_files_are_one_source(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "part-2.jsonl", '{"a": 2}\nx\n')
    write(tmp_path / "part-1.csv", "b\n1\n")
    write(tmp_path / "part-3.jsonl", "")
    write(tmp_path / "deep" / "er" / "part-2.jsonl", '{"a": 4}\n')
    source = open_source(f"{tmp_path}/part-*")
    assert (source.label, source.columns) == ("part-* (3 files)", ("b", "a"))
    assert list(source.rows()) == [
        SourceRow({"b": "1"}, "part-1.csv:2"),
        SourceRow({"a": 2}, "part-2.jsonl:1"),
        BrokenLine("part-2.jsonl:2:1", "not JSON: Expecting value"),
    ]
    everywhere = open_source(f"{tmp_path}/**/part-2.jsonl")
    assert [item.where for item in everywhere.rows()] == [
        "deep/er/part-2.jsonl:1",
        "part-2.jsonl:1",
        "part-2.jsonl:2:1",
    ]
    assert everywhere.label == "**/part-2.jsonl (2 files)"
    assert everywhere.sha256 != source.sha256

    before = source.sha256
    (tmp_path / "part-3.jsonl").rename(tmp_path / "part-4.jsonl")
    assert open_source(f"{tmp_path}/part-*").sha256 != before


def test_a_pattern_of_one_file_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", '{"a": 1}')
    monkeypatch.chdir(tmp_path)
    one, file = open_source("r*.jsonl"), open_source("rows.jsonl")
    assert (one.label, one.sha256) == (file.label, file.sha256)
    write(tmp_path / "rows[1].jsonl", '{"a": 2}')
    assert rows_of(open_source("rows[1].jsonl"))[0].fields == {"a": 2}  # a file of that very name comes first


@pytest.mark.parametrize(
    ("pattern", "told", "hint"),
    [
        ("data/part-*.csv", "no file matches", "in data: part-1.jsonl, part-2.jsonl"),
        ("dat/*.jsonl", "there is no directory dat", "did you mean 'data'?"),
        ("other/*.jsonl", "no file matches", "in other: deep/"),
        ("data/*", "matches files of an unknown kind: README.md", "narrow it"),
        ("data/*.jsonl", "data/*.jsonl has no split", "remove data.split"),
    ],
)
def test_patterns_that_give_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, told: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "other" / "deep").mkdir(parents=True)
    for name in ("part-1.jsonl", "part-2.jsonl", "README.md"):
        write(tmp_path / "data" / name, '{"a": 1}')
    with pytest.raises(DataError) as caught:
        open_source(pattern, split="test" if "split" in told else "train")
    assert told in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint


def test_several_empty_files_are_empty(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "\n")
    with pytest.raises(DataError, match=r"\*.jsonl \(2 files\) is empty"):
        open_source(f"{tmp_path}/*.jsonl")


# --- means ------------------------------------------------------------------------------------------------------------


def test_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv")]
    for path, save in zip(paths, (as_jsonl, as_json, as_delimited, as_delimited), strict=True):
        save(path)
    code = (
        "import locale, sys; from gemma_tune.data.sources.source import open_source\n"
        "assert locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8')\n"
        "for path in sys.argv[1:]: print(ascii([row.fields for row in open_source(path).rows()]))"
    )
    plain_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], env=plain_locale, capture_output=True, check=True, text=True
    )
    assert done.stdout.splitlines() == [ascii(ROWS)] * len(paths)


def _text_lines(size: int) -> Iterator[bytes]:
    line = json.dumps({"instruction": 'Say "Wörld": ' * 8, "response": "line\n" * 90}, ensure_ascii=False).encode()
    for _ in range(size // len(line)):
        yield line + b"\n"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    lines = list(_text_lines(50_000_000))
    if kind == "csv":
        path.write_bytes(b"a\n" + b"".join(b'"' + line.replace(b'"', b'""') + b'"\n' for line in lines))
    elif kind == "parquet":
        table = pyarrow.table({"a": [line.decode() for line in lines]})
        pyarrow.parquet.write_table(table, path, row_group_size=5_000)
    else:
        path.write_bytes(gzip.compress(b"".join(lines), 1) if kind.endswith(".gz") else b"".join(lines))
    num_lines = len(lines)
    del lines
    table = None
    arrow_before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        num_rows = arrow_peak = 0
        for _ in open_source(str(path)).rows():
            num_rows += 1
            arrow_peak = max(arrow_peak, pyarrow.total_allocated_bytes() - arrow_before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_rows == num_lines
    assert peak < 20_000_000 and arrow_peak < 20_000_000


def test_reading_costs_little_more_than_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(_text_lines(12_000_000)))

    def seconds(read: Any) -> float:
        started = time.perf_counter()
        read()
        return time.perf_counter() - started

    def ratio() -> float:  # both within moments, as the machine has other work, too
        plain = seconds(lambda: [json.loads(line) for line in path.read_bytes().splitlines()])
        return seconds(lambda: sum(1 for _ in open_source(str(path)).rows())) / plain

    assert min(ratio() for _ in range(5)) < 3


# --- tiny-world and the hub -------------------------------------------------------------------------------------------


def test_hub_settings_are_refused_for_files(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "rows.jsonl")
    for settings in ({"subset": "x"}, {"revision": "main"}, {"split": "test"}):
        with pytest.raises(DataError, match=f"has no {next(iter(settings))}"):
            open_source(str(tmp_path / "rows.jsonl"), **settings)


def test_tiny_world_has_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "eval"):
        write(tmp_path / f"{split}.jsonl", json.dumps({"instruction": split}))
    monkeypatch.setattr(sources, "TINY_ROWS_DIR", tmp_path)
    assert rows_of(open_source("tiny-world"))[0].fields == {"instruction": "train"}
    assert open_source("tiny-world", split="eval").label == "tiny-world[eval]"
    with pytest.raises(DataError, match="no split 'test'"):
        open_source("tiny-world", split="test")


def test_hub_rows_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load_dataset(path: str, **settings: object) -> datasets.Dataset:
        asked.update(settings, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = open_source("owner/rows", subset="en", split="train", revision="abc")
    assert asked == {"path": "owner/rows", "name": "en", "split": "train", "revision": "abc"}
    assert [row.fields for row in rows_of(loaded)] == ROWS
    assert rows_of(loaded)[1].where == "owner/rows[train]:1"
    assert (loaded.label, loaded.columns) == ("owner/rows[train]", ("instruction", "response"))
    as_json = b"".join(json.dumps(row, sort_keys=True).encode() for row in ROWS)
    assert loaded.sha256 == hashlib.sha256(as_json).hexdigest()


def test_hub_rows_come_in_batches_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_list([{"a": number, "b": [{"c": str(number)}]} for number in range(2600)])
    made = made.select(range(2500))  # an index over the rows, as a split with a slice has it
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: made)
    monkeypatch.setattr(made, "to_dict", None)
    rows = rows_of(open_source("owner/rows"))
    assert [row.fields for row in rows] == [{"a": number, "b": [{"c": str(number)}]} for number in range(2500)]
    assert rows[-1].where == "owner/rows[train]:2499"


def test_a_hub_dataset_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = datasets.Dataset.from_dict({"a": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: empty)
    with pytest.raises(DataError, match=r"owner/rows\[train\] .*holds no rows"):
        open_source("owner/rows")


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
        open_source("owner/rows")
    assert caught.value.hint
