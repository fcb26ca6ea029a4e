"""Rows out of files of cells with a delimiter between them, as csv modules, pandas, Excel and databases write them."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter

from gemma_tune.data.sources.items import (
    ESCAPED_BYTE,
    STOPPED,
    BrokenLine,
    RowFile,
    SourceItem,
    SourceNote,
    SourceRow,
    escaped_byte,
    is_index_name,
    not_utf8,
    utf8_hint,
)
from gemma_tune.errors import DataError
from gemma_tune.text import counted

# csv's default of 131,072 characters is shorter than some contexts; the limit is a C long, 32 bits on Windows.
_CSV_FIELD_CHARS = 2**31 - 1
_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_BYTES = 2**16
_SAMPLE_RECORDS = 100
# The first line that Excel reads and writes as the file's delimiter.
_SEP_LINE = re.compile(r'"?sep=([^"\r\n])"?(?:\r\n|\r|\n)', re.IGNORECASE)


def read_delimited(stream: io.BufferedReader, file: RowFile, *, delimiter: str) -> Iterator[SourceItem]:
    """Read a row of cells under a header; `delimiter` is taken where another one does not fit better.

    Empty rows, empty columns without a name and an index column of pandas are left out.
    """
    name, hint = file.name, utf8_hint(file)
    csv.field_size_limit(_CSV_FIELD_CHARS)
    damage: list[tuple[int, int]] = []
    sample = stream.peek(_SAMPLE_BYTES)[:_SAMPLE_BYTES].decode("utf-8", errors="surrogateescape")
    named = _SEP_LINE.match(sample)
    if named:
        stream.read(len(named[0].encode("utf-8", errors="surrogateescape")))
        sample = sample[named.end() :]
    skipped = 1 if named else 0
    delimiter = named[1] if named else _find_delimiter(sample, default=delimiter)
    header_cells = next(iter(_records(sample, delimiter)), [])
    spaced = len(header_cells) > 1 and all(cell.startswith(" ") for cell in header_cells[1:])  # `a, "b"`
    with io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text:
        lines = _noting_damage(text, damage, first=skipped + 1)
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        header: _Header | None = None
        line = skipped + 1
        try:
            for cells in reader:
                where, line = f"{name}:{line}", skipped + reader.line_num + 1
                if damage:
                    (bad_line, byte), *_ = damage
                    damage.clear()
                    where, problem = f"{name}:{bad_line}", not_utf8(byte)
                    if header is None:
                        raise DataError(f"{where}: {problem}", hint=hint)
                    yield BrokenLine(where, problem, hint=hint)
                elif not any(cells):
                    continue
                elif header is None:
                    header = _Header(cells, where)
                    yield from header.notes(name)
                elif isinstance(found := header.fields_of(cells), str):
                    yield BrokenLine(where, found)
                else:
                    yield SourceRow(found, where)
        except csv.Error as error:
            # Where a quote is misplaced nobody knows which of the next lines are inside a cell: a guess would make rows
            # out of halves of rows.
            told = f"{error} (a quoted cell doubles the quotes in it); {STOPPED}"
            yield BrokenLine(f"{name}:{line}", told, ends_reading=True)


class _Header:
    """The columns of a file, by their first row."""

    def __init__(self, cells: list[str], where: str) -> None:
        """Name the columns; raises a DataError where two have one name."""
        names = [cell.strip() for cell in cells]
        self._names = names
        self.index = names[0] if len(names) > 1 and is_index_name(names[0]) else None
        first = 0 if self.index is None else 1
        self._unnamed = [number for number in range(first, len(names)) if not names[number]]
        self._named = [number for number in range(first, len(names)) if names[number]]
        self._is_plain = len(self._named) == len(names)
        columns = [names[number] for number in self._named]
        twice = [column for number, column in enumerate(columns) if column in columns[:number]]
        if twice:
            hint = "the first line names every column, each name once"
            raise DataError(f"{where}: two columns are called {twice[0]!r}", hint=hint)

    def notes(self, name: str) -> Iterator[SourceNote]:
        """What is left out of every row."""
        if self.index is not None:
            yield SourceNote(f"{name}: the first column, {self.index or 'without a name'}, is an index and is not read")

    def fields_of(self, cells: list[str]) -> dict[str, object] | str:
        """The fields of a row, or why it is none."""
        names = self._names
        if self._is_plain and len(cells) == len(names):
            return dict(zip(names, cells, strict=True))
        # Excel ends rows with the delimiters of columns that were in use once.
        if len(cells) < len(names) or any(cells[len(names) :]):
            return f"{counted(len(cells), 'cell')} where the header has {len(names)}"
        unnamed = next((number for number in self._unnamed if cells[number]), None)
        if unnamed is not None:
            return f"a cell in column {unnamed + 1}, which has no name in the header"
        return {names[number]: cells[number] for number in self._named}


def _records(sample: str, delimiter: str) -> list[list[str]]:
    """The first records of a sample that are not empty, as far as they can be read."""
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
    try:
        return [cells for cells in islice(reader, _SAMPLE_RECORDS) if any(cells)]
    except csv.Error:
        return []


def _find_delimiter(sample: str, *, default: str) -> str:
    """The delimiter of the header that cuts most of the first rows into as many cells; `default` where none does."""
    best, best_fit = default, (0.5, False, 1)
    for delimiter in _DELIMITERS:
        header, *rows = _records(sample, delimiter) or [[]]
        if len(header) > 1:
            share = sum(len(cells) == len(header) for cells in rows) / len(rows) if rows else 1.0
            best, best_fit = max(
                (best, best_fit), (delimiter, (share, delimiter == default, len(header))), key=itemgetter(1)
            )
    return best


def _noting_damage(lines: Iterable[str], damage: list[tuple[int, int]], *, first: int) -> Iterator[str]:
    """`lines`; line number and byte of each one that is not UTF-8 are put into `damage` before it is given."""
    for number, line in enumerate(lines, start=first):
        if not line.isascii() and (byte := ESCAPED_BYTE.search(line)):
            damage.append((number, escaped_byte(byte)))
        yield line
