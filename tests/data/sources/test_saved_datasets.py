"""Folders of save_to_disk and Arrow files; the library datasets and pyarrow write them."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from gemma_tune.data.look.count import count_rows
from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.errors import DataError

ROWS = [{"question": f"Where is tree {n}?", "talk": [{"role": "user", "content": str(n)}]} for n in range(2500)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one`, saved as two files, and `splits`, with train and test."""
    folder = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(folder / "one"), num_shards=2)
    splits = {"train": whole.select(range(5, 20)), "test": whole.select([7, 3])}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    return folder


def test_a_saved_set_of_rows_is_read_in_order(saved: Path) -> None:
    source = open_source(str(saved / "one"))
    rows = read_whole(source)
    assert [row.fields for row in rows] == ROWS
    assert rows[1].where == "one/data-00000-of-00002.arrow[1]"
    assert rows[-1].where == "one/data-00001-of-00002.arrow[1249]"
    assert source.columns == ("question", "talk") and source.label == "one"
    assert open_source(f"{saved}/one/").sha256 == source.sha256
    assert count_rows(str(saved / "one")).rows == 2500


@pytest.mark.parametrize(("split", "expected"), [("train", ROWS[5:20]), ("test", [ROWS[7], ROWS[3]])])
def test_a_split_is_chosen(saved: Path, split: str, expected: list[dict[str, object]]) -> None:
    source = open_source(str(saved / "splits"), split=split)
    assert [row.fields for row in read_whole(source)] == expected
    assert source.label == f"splits[{split}]"
    assert count_rows(str(saved / "splits"), split=split).rows == len(expected)


def test_splits_that_are_not_there(saved: Path) -> None:
    with pytest.raises(DataError, match="has no split 'dev'; its splits: train, test") as caught:
        open_source(str(saved / "splits"), split="dev")
    assert caught.value.hint == "set data.split=train"
    with pytest.raises(DataError, match="has no split 'test': it is one set of rows"):
        open_source(str(saved / "one"), split="test")
    with pytest.raises(DataError, match="has no revision"):
        open_source(str(saved / "one"), revision="main")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("state.json", b"{", "state.json is missing or is not a JSON object"),
        ("state.json", b'{"_data_files": []}', "does not name the Arrow files"),
        ("state.json", b'{"_data_files": [{"filename": "../rows.arrow"}]}', "does not name the Arrow files"),
        ("state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}', "no such file"),
        ("data-00000-of-00002.arrow", b"\xff\xff\xff\xff\x10", "one/data-00000-of-00002.arrow is not a whole Arrow"),
        ("data-00001-of-00002.arrow", None, "one/data-00001-of-00002.arrow is not a whole Arrow file"),
    ],
)
def test_a_damaged_folder(saved: Path, tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    folder = tmp_path / "one"
    shutil.copytree(saved / "one", folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(DataError) as caught:
        read_whole(open_source(str(folder)))
    assert told in caught.value.message and caught.value.hint


@pytest.mark.parametrize("name", ["rows.arrow", "stream.arrow", "rows.feather", "rows.parquet"])
def test_tables_of_pandas_without_their_index(tmp_path: Path, name: str) -> None:
    frame = pandas.DataFrame(ROWS, index=[f"row {number}" for number in range(len(ROWS))])
    table = pyarrow.Table.from_pandas(frame)
    path = tmp_path / name
    if name == "stream.arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif name == "rows.parquet":
        frame.to_parquet(path)
    else:
        pyarrow.feather.write_feather(table, path)
    source = open_source(str(path))
    assert [row.fields for row in read_whole(source)] == ROWS
    assert source.notes == (f"{name}: the column __index_level_0__ is an index and is not read",)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.parquet", "b.parquet", "README.md", "dataset_info.json"], ["a.parquet", "b.parquet"]),
        (
            ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"],
            ["train-0.parquet", "train-1.parquet"],
        ),
        (["one/shard 1.arrow"], ["shard 1.arrow"]),
    ],
)
def test_the_hint_for_a_folder_of_files_is_a_source(tmp_path: Path, names: list[str], chosen: list[str]) -> None:
    for name in names:
        path = tmp_path / "my rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([{"a": path.name}])
        if path.suffix == ".arrow":
            pyarrow.feather.write_feather(table, path)
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            path.write_text("{}")
    with pytest.raises(DataError, match="is a directory, not a file of rows") as caught:
        open_source(str(tmp_path / "my rows"))
    assert caught.value.hint is not None
    (given,) = shlex.split(caught.value.hint.partition("data.source=")[2])
    assert [row.fields["a"] for row in read_whole(open_source(given))] == chosen
