"""Rows out of Arrow tables, Arrow files and parquet files."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gemma_tune.data.sources.items import (
    BrokenLine,
    RowFile,
    SourceItem,
    SourceNote,
    SourceRow,
    is_index_name,
    not_utf8,
)
from gemma_tune.errors import DataError

BATCH_ROWS = 1_000
_FILE_MARK = b"ARROW1"
_BUFFER_BYTES = 2**18


def arrow_rows(batches: Iterable[Any], place: Callable[[int], str]) -> Iterator[SourceItem]:
    """The rows of Arrow batches or tables; `place` says where the row with a 0-based index is."""
    first = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):
            # Text that is not UTF-8, or a date that Python does not have: find the rows that hold it.
            yield from _arrow_rows_one_by_one(batch, first, place)
        else:
            for index, row in enumerate(rows, start=first):
                yield SourceRow(row, place(index))
        first += batch.num_rows


def _arrow_rows_one_by_one(batch: Any, first: int, place: Callable[[int], str]) -> Iterator[SourceItem]:
    for offset in range(batch.num_rows):
        where = place(first + offset)
        try:
            yield SourceRow(batch.slice(offset, 1).to_pylist()[0], where)
        except UnicodeDecodeError as error:
            yield BrokenLine(
                where, not_utf8(error.object[error.start]), hint="write the table again with its text in UTF-8"
            )
        except (ValueError, OverflowError) as error:
            yield BrokenLine(where, str(error))


def read_parquet(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    """Read a parquet file."""
    import pyarrow
    import pyarrow.parquet

    # A compressed one must be unpacked whole: parquet is read from its end.
    content = file.path if isinstance(stream.raw, io.FileIO) else pyarrow.BufferReader(stream.read())
    # pre_buffer would keep the bytes of every row group until the end.
    with (
        _whole(file, "parquet"),
        pyarrow.parquet.ParquetFile(content, pre_buffer=False, buffer_size=_BUFFER_BYTES) as table,
    ):
        yield from _table_rows(table.schema_arrow.names, table.iter_batches(batch_size=BATCH_ROWS), file)


def read_arrow(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    """Read an Arrow file or stream, of which a set of rows saved by the library datasets is made."""
    import pyarrow
    import pyarrow.ipc

    with _whole(file, "Arrow"):
        if not stream.peek(len(_FILE_MARK)).startswith(_FILE_MARK):
            with pyarrow.ipc.open_stream(stream) as batches:
                yield from _table_rows(batches.schema.names, _in_parts(batches), file)
            return
        # A file is read from its end.
        with pyarrow.ipc.open_file(pyarrow.BufferReader(stream.read())) as table:
            parts = (table.get_batch(number) for number in range(table.num_record_batches))
            yield from _table_rows(table.schema.names, _in_parts(parts), file)


def _in_parts(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _table_rows(names: list[str], batches: Iterable[Any], file: RowFile) -> Iterator[SourceItem]:
    twice = [column for index, column in enumerate(names) if column in names[:index]]
    if twice:
        raise DataError(f"{file.name}: two columns are called {twice[0]!r}", hint="rename one of them")
    index = [name for name in names if name and is_index_name(name)]
    if index:
        yield SourceNote(f"{file.name}: the column {index[0]} is an index and is not read")
        batches = (batch.drop_columns(index) for batch in batches)
    yield from arrow_rows(batches, lambda number: f"{file.name}[{number}]")


@contextmanager
def _whole(file: RowFile, kind: str) -> Iterator[None]:
    """Tell what stops the reading of a table."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file.name} is not a whole {kind} file: {said}", hint="download or write it again") from None
