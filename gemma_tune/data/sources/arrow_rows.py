"""Rows out of Arrow tables and parquet files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gemma_tune.data.sources.items import BrokenLine, RowFile, SourceItem, SourceRow, not_utf8
from gemma_tune.errors import DataError

BATCH_ROWS = 1_000
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
    try:
        # pre_buffer would keep the bytes of every row group until the end.
        with pyarrow.parquet.ParquetFile(content, pre_buffer=False, buffer_size=_BUFFER_BYTES) as table:
            names = table.schema_arrow.names
            twice = [column for index, column in enumerate(names) if column in names[:index]]
            if twice:
                raise DataError(f"{file.name}: two columns are called {twice[0]!r}", hint="rename one of them")
            yield from arrow_rows(table.iter_batches(batch_size=BATCH_ROWS), lambda index: f"{file.name}[{index}]")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name} is not a whole parquet file: {str(error).splitlines()[0]}", hint="download or write it again"
        ) from None
