"""JSON files that are one object: a table by its columns, or rows behind a key. json and pandas are the oracles."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from gemma_tune.data.sources import json_rows
from gemma_tune.data.sources.source import BrokenLine, SourceRow, open_source, read_whole
from gemma_tune.errors import DataError

ROWS = [{"question": f"Where is tree {number}?", "answer": "In the\npark.", "n": number} for number in range(3)]


def saved(path: Path, content: object, **options: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, **options), encoding="utf-8")
    return path


def fields(path: Path) -> list[dict[str, object]]:
    return [row.fields for row in read_whole(open_source(str(path)))]


@pytest.mark.parametrize("orient", ["columns", "split", "index", "records", "table"])
@pytest.mark.parametrize("index", [[0, 1, 2], [3, 7, 12]])
def test_what_pandas_writes(tmp_path: Path, orient: Any, index: list[int]) -> None:
    pandas.DataFrame(ROWS, index=index).to_json(tmp_path / "rows.json", orient=orient)
    read = [{name: row[name] for name in ROWS[0]} for row in fields(tmp_path / "rows.json")]
    assert read == ROWS


@pytest.mark.parametrize("indent", [None, 1])
def test_columns_of_lists_are_rows(tmp_path: Path, indent: int | None) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    source = open_source(str(saved(tmp_path / "rows.json", columns, indent=indent)))
    rows = read_whole(source)
    assert [row.fields for row in rows] == ROWS
    assert [row.where for row in rows] == ["rows.json[0]", "rows.json[1]", "rows.json[2]"]
    assert source.columns == ("question", "answer", "n")


def test_a_column_of_conversations_is_a_column(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert fields(saved(tmp_path / "rows.json", {"messages": [talk, talk]})) == [{"messages": talk}] * 2
    sides = {"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}
    assert fields(saved(tmp_path / "rows.json", sides)) == [{"chosen": {"content": "a"}, "rejected": {"content": "b"}}]


def test_rows_behind_a_key_keep_their_lines(tmp_path: Path) -> None:
    text = '{"version": {"list": [1]},\n "da\\u0074a" :\n[{"a": 1},\n\n{"a": 2}, 7,\n{"a": 1, "a": 2}],\n"end": "]"}'
    source = open_source(str(saved(tmp_path / "rows.json", text)))
    assert list(source.rows()) == [
        SourceRow({"a": 1}, "rows.json:3"),
        SourceRow({"a": 2}, "rows.json:5"),
        BrokenLine("rows.json:5", "a number, not an object"),
        BrokenLine("rows.json:6", "key 'a' twice"),
    ]
    assert source.notes == ("rows.json: its rows are the list behind the key 'data'",)


EDGES = {"data": {"tickets": {"edges": [{"node": {"a": 1}, "cursor": "x"}, {"node": {"a": 2}, "cursor": "y"}]}}}


@pytest.mark.parametrize(
    ("content", "told", "expected"),
    [
        ({"data": {"tickets": [{"a": 1}, {"a": 2}]}}, "deeper down, in data.tickets", [{"a": 1}, {"a": 2}]),
        (EDGES, "deeper down, in data.tickets.edges.node", [{"a": 1}, {"a": 2}]),
        ({"x1": {"a": 1}, "x2": {"a": 2}}, "one object of objects", [{"a": 1}, {"a": 2}]),
        ({"a'b": [{"a": 1}], "c": [{"a": 2}, {"a": 3}]}, "with the lists", [{"a": 1}]),
    ],
)
def test_rows_further_down_are_refused_with_a_command_that_works(
    tmp_path: Path, content: object, told: str, expected: object
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    path = saved(folder / "rows.json", content)
    with pytest.raises(DataError) as caught:
        open_source(str(path))
    assert told in caught.value.message
    assert caught.value.hint is not None
    command = caught.value.hint[caught.value.hint.index("jq ") :]
    if shutil.which("jq"):
        subprocess.run(["sh", "-c", command], check=True)
        assert fields(folder / "rows-of-rows.json") == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": ["x"], "a": ["y"]}', "key 'a' twice"),
        ('{"a": [{"b": 1}], "a": [{"b": 2}]}', "key 'a' twice"),
        ('{"a": ["\\ud800"]}', "rows.json[0]: half of a character"),
        ('{"a": [], "b": []}', "holds no rows"),
        ('{"a": {"0": "x"}, "b": {"1": "y"}}', "one object of objects"),
        ("{}", "is one object, not a list of objects"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        read_whole(open_source(str(saved(tmp_path / "rows.json", text))))
    assert told in caught.value.message


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(st.characters(codec="utf-8"), max_size=8))
NAMES = st.text(st.characters(codec="utf-8"), max_size=6)


@bounded(max_examples=100, deadline=None)
@given(data=st.data(), names=st.lists(NAMES, min_size=1, max_size=4, unique=True), indent=st.sampled_from([None, 1]))
def test_every_form_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, names: list[str], indent: int | None
) -> None:
    row = st.fixed_dictionaries(dict.fromkeys(names, VALUES))
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    by_column = {name: [row[name] for row in rows] for name in names}
    by_index = {name: {str(number): row[name] for number, row in enumerate(rows)} for name in names}
    folder = tmp_path_factory.mktemp("json")
    for content in (rows, by_column, by_index, {"meta": "x", "rows": rows}):
        for ascii_only in (True, False):
            path = saved(folder / "rows.json", content, indent=indent, ensure_ascii=ascii_only)
            assert fields(path) == rows


def test_a_line_that_a_small_file_unpacks_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 2_000_000)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"a": 1}\n{"a": "' + "x" * 50_000_000 + '"}\n')
    tracemalloc.start()
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:2: a line of more than 2 MB, which no row is"):
        list(open_source(str(path)).rows())
    assert tracemalloc.get_traced_memory()[1] < 15e6
    tracemalloc.stop()


def test_a_row_of_many_keys_one_of_them_twice_is_read_soon(tmp_path: Path) -> None:
    keys = ", ".join(f'"k{number}": 1' for number in [*range(200_000), 7])
    started = time.process_time()
    rows = list(open_source(str(saved(tmp_path / "rows.jsonl", f"{{{keys}}}\n"))).rows())
    assert rows == [BrokenLine("rows.jsonl:1", "key 'k7' twice")]
    assert time.process_time() - started < 5
