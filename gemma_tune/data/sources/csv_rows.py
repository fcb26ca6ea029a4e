"""Rows out of files of cells with a delimiter between them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from gemma_tune.data.sources.items import (
    ESCAPED_BYTE,
    STOPPED,
    BrokenLine,
    RowFile,
    SourceItem,
    SourceRow,
    escaped_byte,
    not_utf8,
    utf8_hint,
)
from gemma_tune.errors import DataError

# csv's default of 131,072 characters is shorter than some contexts; the limit is a C long, 32 bits on Windows.
_CSV_FIELD_CHARS = 2**31 - 1


def read_delimited(stream: io.BufferedReader, file: RowFile, *, delimiter: str) -> Iterator[SourceItem]:
    """Read a row of cells under a header."""
    name = file.name
    csv.field_size_limit(_CSV_FIELD_CHARS)
    damage: list[tuple[int, int]] = []
    with io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text:
        reader = csv.reader(_noting_damage(text, damage), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                where, line = f"{name}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if damage:
                    (bad_line, byte), *_ = damage
                    damage.clear()
                    where, problem = f"{name}:{bad_line}", not_utf8(byte)
                    if header is None:
                        raise DataError(f"{where}: {problem}", hint=utf8_hint(file.path.name))
                    yield BrokenLine(where, problem)
                elif header is None:
                    header = _checked_header(cells, where)
                elif len(cells) != len(header):
                    counted = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
                    yield BrokenLine(where, f"{counted} where the header has {len(header)}")
                else:
                    yield SourceRow(dict(zip(header, cells, strict=True)), where)
        except csv.Error as error:
            # Where a quote is misplaced nobody knows which of the next lines are inside a cell: a guess would make rows
            # out of halves of rows.
            told = f"{error} (a quoted cell doubles the quotes in it); {STOPPED}"
            yield BrokenLine(f"{name}:{line}", told, ends_reading=True)


def _noting_damage(lines: Iterable[str], damage: list[tuple[int, int]]) -> Iterator[str]:
    """`lines`; line number and byte of each one that is not UTF-8 are put into `damage` before it is given."""
    for number, line in enumerate(lines, start=1):
        if not line.isascii() and (byte := ESCAPED_BYTE.search(line)):
            damage.append((number, escaped_byte(byte)))
        yield line


def _checked_header(cells: list[str], where: str) -> list[str]:
    wrong = [cell for index, cell in enumerate(cells) if not cell.strip() or cell in cells[:index]]
    if wrong:
        fault = f"two columns are called {wrong[0]!r}" if wrong[0].strip() else "a column has no name"
        raise DataError(f"{where}: {fault}", hint="the first line names every column, each name once")
    return cells
