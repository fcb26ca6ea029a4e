"""Rows out of one file, read as a stream, every row and every broken piece with its line.

Files are read with the standard library and decoded here, so that every mistake is told with file and line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.data.sources.items import BrokenLine, SourceItem, SourceRow
from gemma_tune.errors import DataError
from gemma_tune.text import did_you_mean

MAX_SHOWN = 5
BATCH_ROWS = 1_000
_BUFFER_BYTES = 2**18
_BOM = b"\xef\xbb\xbf"
# csv's default of 131,072 characters is shorter than some contexts; the limit is a C long, 32 bits on Windows.
_CSV_FIELD_CHARS = 2**31 - 1
_STOPPED = "reading stopped here"
_JSON_HINT = "a .json file is one list of objects: [{…}, {…}]"

# Suffix → (what it is called, how it starts, what reads it). A zstd file may start with a skippable frame.
_COMPRESSIONS: dict[str, tuple[str, tuple[bytes, ...], Callable[[Path], Any]]] = {
    ".gz": ("gzip", (b"\x1f\x8b",), gzip.GzipFile),
    ".bz2": ("bzip2", tuple(b"BZh%d" % level for level in range(1, 10)), bz2.BZ2File),
    ".xz": ("xz", (b"\xfd7zXZ\x00",), lzma.LZMAFile),
    ".zst": (
        "zstd",
        (b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60))),
        lambda path: _zstd_stream(path),
    ),
}
# What files of rows turn out to be: first bytes → (its name in a sentence, the next step).
_FOREIGN: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    **dict.fromkeys(
        (b"<!DOCTYPE html", b"<!doctype html", b"<html", b"<HTML"),
        ("a web page", "download the file itself, not the page that shows it"),
    ),
    b"PK\x03\x04": ("a zip archive (or a spreadsheet)", "unpack it, or save the spreadsheet as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old Office file", "save the spreadsheet as CSV in UTF-8"),
    b"SQLite format 3\0": ("an SQLite database", "export the table as CSV"),
    b"ARROW1\0\0": ("an Arrow file", "convert it to parquet"),
    b"PAR1\x15": ("a parquet file", "let its name end in .parquet"),
}
_HEAD_BYTES = max(map(len, _FOREIGN))


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file of rows that was found and hashed.

    Attributes:
        path: where it lies.
        name: as messages call it.
        sha256: of its bytes on disk.
        stamp: size and modification time when it was hashed.
    """

    path: Path
    name: str
    sha256: str
    stamp: tuple[int, int]


def is_row_file(path: Path) -> bool:
    """Whether the name is that of a file of rows."""
    return _kind_of(path) is not None


def known_kinds() -> str:
    """The kinds of file that are read, for a hint."""
    return f"{', '.join(_READERS)}; each also with {', '.join(_COMPRESSIONS)} behind it"


def find_file(path: Path, *, name: str | None = None) -> RowFile:
    """The file at `path`, hashed; `name` is what messages call it (default: its last part).

    Raises:
        DataError: it is missing, a directory, unreadable or of an unknown kind.
    """
    if os.path.isdir(path):
        files = sorted(child.name for child in path.iterdir() if is_row_file(child))
        hint = f"name one of its files: {shown(files)}" if files else f"give a file: {known_kinds()}"
        raise DataError(f"{path} is a directory, not a file of rows", hint=hint)
    if os.path.exists(path) and not os.path.isfile(path):
        # A pipe can be read once only, and every file is read at least twice.
        raise DataError(f"{path} is not a regular file", hint="save it as a file first")
    try:
        with path.open("rb") as file:
            if not is_row_file(path):
                raise DataError(f"{path}: unknown kind of file", hint=f"rename or convert it; known: {known_kinds()}")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return RowFile(path, name or path.name, digest, _stamp(os.fstat(file.fileno())))
    except FileNotFoundError:
        beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file: {path}", hint=did_you_mean(path.name, beside) or "check data.source") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def read_rows(file: RowFile) -> Iterator[SourceItem]:
    """The rows of `file` and its broken pieces, in order.

    Raises:
        DataError: it is not what its name says, is compressed and not whole, is UTF-16, was changed since it was
            hashed, or has a header that names no columns.
    """
    read = _READERS[_kind_of(file.path) or ""]
    with _told(file), _opened(file) as stream:
        head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        if not head:
            return
        _refuse_foreign(head, file)
        if read is not _read_parquet:
            _refuse_utf16(head, file)
            if head.startswith(_BOM):
                stream.read(len(_BOM))
        yield from read(stream, file)


def shown(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = [f"and {len(every) - MAX_SHOWN:,} more"] if len(every) > MAX_SHOWN else []
    return ", ".join([*every[:MAX_SHOWN], *more])


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
            yield BrokenLine(where, _not_utf8(error.object[error.start]))
        except (ValueError, OverflowError) as error:
            yield BrokenLine(where, str(error))


# --- opening ----------------------------------------------------------------------------------------------------------


def _compression_of(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else None


def _kind_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _opened(file: RowFile) -> io.BufferedReader:
    """The file's bytes, uncompressed."""
    with file.path.open("rb") as raw:
        if _stamp(os.fstat(raw.fileno())) != file.stamp:
            raise DataError(f"{file.path} was changed while it was being read", hint="start again when it is complete")
        _refuse_wrong_compression(raw.read(_HEAD_BYTES), file)
    compression = _compression_of(file.path)
    unpacked = io.FileIO(file.path) if compression is None else _COMPRESSIONS[compression][2](file.path)
    return io.BufferedReader(unpacked, _BUFFER_BYTES)


def _zstd_stream(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


@contextmanager
def _told(file: RowFile) -> Iterator[None]:
    """Tell what stops the reading of the whole file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        compression = _compression_of(file.path)
        if compression is None:
            raise DataError(f"cannot read {file.path}: {error}") from None
        kind = _COMPRESSIONS[compression][0]
        raise DataError(
            f"{file.path} is not a whole {kind} file: {error}", hint="download or compress it again"
        ) from None


def _refuse_wrong_compression(head: bytes, file: RowFile) -> None:
    """Refuse a name that promises another compression than the file's first bytes."""
    named = _compression_of(file.path)
    found = next((suffix for suffix, (_, starts, _) in _COMPRESSIONS.items() if head.startswith(starts)), None)
    if not head or found == named:
        return
    stem = file.path.name.removesuffix(file.path.suffix) if named else file.path.name
    told = f"it is compressed with {_COMPRESSIONS[found][0]}" if found else "it is not compressed"
    wrong = f"not a whole {_COMPRESSIONS[named][0]} file" if named else f"not plain {_kind_of(file.path)}"
    raise DataError(
        f"{file.path} is {wrong}: by its first bytes {told}", hint=f"download it again, or name it {stem}{found or ''}"
    )


def _refuse_foreign(head: bytes, file: RowFile) -> None:
    start = head.removeprefix(_BOM).lstrip()
    for magic, (what, hint) in _FOREIGN.items():
        if start.startswith(magic) and not (what == "a parquet file" and _kind_of(file.path) == ".parquet"):
            raise DataError(f"{file.path} is {what}, by its first bytes", hint=hint)
    for kind, starts, _ in _COMPRESSIONS.values():
        if head.startswith(starts):
            raise DataError(f"{file.path} is compressed twice, with {kind} inside", hint="unpack it once")


def _refuse_utf16(head: bytes, file: RowFile) -> None:
    # Without a BOM it shows by its zero bytes: a file of rows starts with signs of ASCII.
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        name = file.path.name
        raise DataError(
            f"{file.name}:1: not UTF-8 (byte 0x{head[0]:02x}), it looks like UTF-16",
            hint=f"save the file as UTF-8, for example: iconv -f UTF-16 -t UTF-8 {name} > utf8-{name}",
        )


# --- JSON -------------------------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    """A JSON value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]


def _not_utf8(byte: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x})"


# What surrogateescape makes of bytes that are not UTF-8.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def _escaped_byte(match: re.Match[str]) -> int:
    return ord(match[0]) - 0xDC00


def _decoder() -> tuple[json.JSONDecoder, list[str]]:
    """A JSON decoder, and the list where it leaves every key that one object has twice."""
    twice: list[str] = []

    def to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(key for index, key in enumerate(keys) if key in keys[:index])
        return made

    return json.JSONDecoder(object_pairs_hook=to_dict), twice


def _value_problem(value: object, *, text: str, twice: list[str]) -> str | None:
    """Why a JSON value with the text `text` is no row; empties `twice`."""
    if twice:
        key = twice[0]
        twice.clear()
        return f"key {key!r} twice"
    if not isinstance(value, dict):
        return f"{_kind(value)}, not an object"
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            return f"half of a character (\\u{half:04x} without its partner)"
        except RecursionError as error:
            return _json_problem(error)
    return None


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of too many digits"  # the only other ValueError: Python converts up to 4,300


def _read_jsonl(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    name = file.name
    decoder, twice = _decoder()
    decode = decoder.decode
    is_first = True
    # Bytes are split at \n only: U+2028 and its like are allowed inside a JSON string and end no line.
    for number, raw in enumerate(stream, start=1):
        if raw.isspace():
            continue
        where = f"{name}:{number}"
        if is_first:
            is_first = False
            _refuse_list(raw, stream, file)
        try:
            line = raw.rstrip(b"\r\n").decode("utf-8")
            value = decode(line)
            problem = _value_problem(value, text=line, twice=twice)
        except UnicodeDecodeError as error:
            problem = _not_utf8(error.object[error.start])
        except (ValueError, RecursionError) as error:
            twice.clear()
            problem = _json_problem(error)
            where += f":{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        yield SourceRow(value, where) if problem is None else BrokenLine(where, problem)


def _refuse_list(first_line: bytes, stream: io.BufferedReader, file: RowFile) -> None:
    """Refuse JSON lines that are one list, which would be a broken line for each of its lines."""
    line = first_line.strip()
    goes_on = bool(stream.peek(1).strip())
    # A whole line that is a list, with more lines behind it, is a broken line only.
    is_whole = line.startswith(b"[") and line.endswith(b"]") and not goes_on
    is_start = line.startswith(b"[") and not line.endswith(b"]") and goes_on
    if (is_whole or is_start) and line[1:].lstrip()[:1] in (b"", b"{"):
        raise DataError(
            f"{file.path} holds one JSON list, not one object a line", hint="name it .json instead of .jsonl"
        )


def _read_json(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    name = file.name
    content = stream.read()
    try:
        text, is_damaged = content.decode("utf-8"), False
    except UnicodeDecodeError:
        text, is_damaged = content.decode("utf-8", errors="surrogateescape"), True
    del content
    if not text.strip():
        return
    if text.lstrip().startswith("{"):
        raise _object_error(text, file)
    decoder, twice = _decoder()
    try:
        for value, line, start, end in _array_items(text, decoder):
            where = f"{name}:{line}"
            if is_damaged and (byte := _ESCAPED_BYTE.search(text, start, end)):
                twice.clear()
                bad_line = line + text.count("\n", start, byte.start())
                yield BrokenLine(f"{name}:{bad_line}", _not_utf8(_escaped_byte(byte)))
                continue
            problem = _value_problem(value, text=text[start:end], twice=twice)
            yield SourceRow(value, where) if problem is None else BrokenLine(where, problem)
    except json.JSONDecodeError as error:
        byte = _ESCAPED_BYTE.match(text, error.pos)
        problem = _not_utf8(_escaped_byte(byte)) if byte else _json_problem(error)
        yield BrokenLine(f"{name}:{error.lineno}:{error.colno}", f"{problem}; {_STOPPED}", ends_reading=True)


def _object_error(text: str, file: RowFile) -> DataError:
    """What a .json file is that starts with an object instead of a list."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return DataError(f"{file.name}:{error.lineno}:{error.colno}: {_json_problem(error)}", hint=_JSON_HINT)
    except (ValueError, RecursionError) as error:
        return DataError(f"{file.name}: {_json_problem(error)}", hint=_JSON_HINT)
    if text[end:].strip():
        is_lines = "\n" not in text[start:end]
        hint = "name it .jsonl instead of .json" if is_lines else _JSON_HINT
        kind = "one object a line (JSON lines)" if is_lines else "one object behind the other"
        return DataError(f"{file.path} holds {kind}, not one list", hint=hint)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    if len(lists) == 1:
        # json.dumps quotes a key for jq as well.
        key = json.dumps(lists[0])
        return DataError(
            f"{file.path} is one object whose key {lists[0]!r} holds the list of rows",
            hint=f"save that list alone, for example: jq '.[{key}]' {file.path.name} > rows-of-{file.path.name}",
        )
    names = f" with the lists {shown(map(repr, lists))}" if lists else ""
    return DataError(f"{file.path} is one object{names}, not a list of objects", hint=_JSON_HINT)


_JSON_SPACE = re.compile(r"[ \t\n\r]*")


def _array_items(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[Any, int, int, int]]:
    """The items of a JSON list: value, 1-based line where it starts, start and end of its text."""

    def skip(position: int) -> int:
        match = _JSON_SPACE.match(text, position)
        return match.end() if match else position

    position = skip(0)
    if not text.startswith("[", position):
        raise json.JSONDecodeError("Expecting '[', the start of a list", text, position)
    position = skip(position + 1)
    line, counted = 1, 0
    ended = text.startswith("]", position)
    while not ended:
        line, counted, start = line + text.count("\n", counted, position), position, position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise json.JSONDecodeError(_json_problem(error), text, position) from None
        yield value, line, start, position
        position = skip(position)
        ended = text.startswith("]", position)
        if not ended:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = skip(position + 1)
    position = skip(position + 1)
    if position != len(text):
        raise json.JSONDecodeError("Extra data behind the list", text, position)


# --- CSV --------------------------------------------------------------------------------------------------------------


def _read_delimited(stream: io.BufferedReader, file: RowFile, *, delimiter: str) -> Iterator[SourceItem]:
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
                    where, problem = f"{name}:{bad_line}", _not_utf8(byte)
                    if header is None:
                        raise DataError(f"{where}: {problem}", hint=_utf8_hint(file))
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
            told = f"{error} (a quoted cell doubles the quotes in it); {_STOPPED}"
            yield BrokenLine(f"{name}:{line}", told, ends_reading=True)


def _noting_damage(lines: Iterable[str], damage: list[tuple[int, int]]) -> Iterator[str]:
    """`lines`; line number and byte of each one that is not UTF-8 are put into `damage` before it is given."""
    for number, line in enumerate(lines, start=1):
        if not line.isascii() and (byte := _ESCAPED_BYTE.search(line)):
            damage.append((number, _escaped_byte(byte)))
        yield line


def _utf8_hint(file: RowFile) -> str:
    name = file.path.name
    return f"save the file as UTF-8, for example: iconv -f CP1252 -t UTF-8 {name} > utf8-{name}"


def _checked_header(cells: list[str], where: str) -> list[str]:
    wrong = [cell for index, cell in enumerate(cells) if not cell.strip() or cell in cells[:index]]
    if wrong:
        fault = f"two columns are called {wrong[0]!r}" if wrong[0].strip() else "a column has no name"
        raise DataError(f"{where}: {fault}", hint="the first line names every column, each name once")
    return cells


# --- parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    import pyarrow
    import pyarrow.parquet

    # A compressed one must be unpacked whole: parquet is read from its end.
    content = file.path if _compression_of(file.path) is None else pyarrow.BufferReader(stream.read())
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


_READERS: dict[str, Callable[[io.BufferedReader, RowFile], Iterator[SourceItem]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".parquet": _read_parquet,
}
