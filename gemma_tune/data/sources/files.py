"""Rows out of one file, read as a stream; every row and every broken piece has its line."""

import bz2
import gzip
import io
import lzma
import os
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.data.sources.arrow_rows import read_arrow, read_parquet
from gemma_tune.data.sources.csv_rows import read_delimited
from gemma_tune.data.sources.items import RowFile, SourceItem, utf8_hint
from gemma_tune.data.sources.json_rows import read_json, read_jsonl
from gemma_tune.errors import DataError
from gemma_tune.identity import file_sha256, file_stamp
from gemma_tune.text import did_you_mean

_BUFFER_BYTES = 2**18
_BOM = b"\xef\xbb\xbf"


def _zstd_stream(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


# Suffix → (what it is called, how it starts, what reads it). A zstd file may start with a skippable frame.
_COMPRESSIONS: dict[str, tuple[str, tuple[bytes, ...], Callable[[Path], Any]]] = {
    ".gz": ("gzip", (b"\x1f\x8b",), gzip.GzipFile),
    ".bz2": ("bzip2", tuple(b"BZh%d" % level for level in range(1, 10)), bz2.BZ2File),
    ".xz": ("xz", (b"\xfd7zXZ\x00",), lzma.LZMAFile),
    ".zst": (
        "zstd",
        (b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60))),
        _zstd_stream,
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
    b"ARROW1\0\0": ("an Arrow file", "let its name end in .arrow"),
    b"PAR1\x15": ("a parquet file", "let its name end in .parquet"),
}
# What JSON files next to rows hold other things.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_HEAD_BYTES = max(map(len, _FOREIGN))


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
        raise DataError(f"{path} is a directory, not a file of rows", hint=_files_hint(path))
    if os.path.exists(path) and not os.path.isfile(path):
        # A pipe can be read once only, and every file is read at least twice.
        raise DataError(f"{path} is not a regular file", hint="save it as a file first")
    try:
        stamp = file_stamp(path)
        if path.suffix.lower() in (".yaml", ".yml"):
            raise DataError(f"{path} is a recipe or a data template, and rows are expected", hint=known_kinds())
        if not is_row_file(path):
            raise DataError(f"{path}: unknown kind of file", hint=f"rename or convert it; known: {known_kinds()}")
        return RowFile(path, name or path.name, file_sha256(path), stamp)
    except FileNotFoundError:
        raise DataError(f"no such file: {path}", hint=near_hint(path)) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _files_hint(directory: Path) -> str:
    """Name the files of rows in a directory or one below it, as a source: those of a kind that lie together."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in sorted([*directory.glob("*"), *directory.glob("*/*")]):
        if is_row_file(path) and path.name not in _NO_ROWS and path.is_file():
            # Of the files of several splits those to train on.
            start = "train" if path.name.startswith("train") else ""
            groups.setdefault((path.parent, f"{start}*{path.suffix}"), []).append(path)
    if not groups:
        return f"give a file: {known_kinds()}"
    (parent, pattern), files = max(groups.items(), key=lambda item: (item[0][1].startswith("train"), len(item[1])))
    return f"name its files: data.source={shlex.quote(str(files[0] if len(files) == 1 else parent / pattern))}"


def near_hint(path: Path) -> str:
    """Name what is next to a path that does not exist and nearly has its name."""
    beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, beside) or "check data.source"


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
        if not any(_kind_of(file.path) in kinds for kinds in _BINARY_KINDS.values()):
            _refuse_utf16(head, file)
            if head.startswith(_BOM):
                stream.read(len(_BOM))
        yield from read(stream, file)


def read_beginning(path: Path, num_bytes: int) -> Iterator[SourceItem]:
    """The rows in the first bytes of an uncompressed file of LINE_KINDS; the last one may be half a row, and broken."""
    with path.open("rb") as stream:
        head = stream.read(num_bytes).removeprefix(_BOM)
    file = RowFile(path, path.name, "", [])
    return _READERS[_kind_of(path) or ""](io.BufferedReader(io.BytesIO(head)), file)


# --- opening ----------------------------------------------------------------------------------------------------------


def _compression_of(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else None


def _kind_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _opened(file: RowFile) -> io.BufferedReader:
    """The file's bytes, uncompressed."""
    if file_stamp(file.path) != file.stamp:
        raise DataError(f"{file.path} was changed while it was being read", hint="start again when it is complete")
    with file.path.open("rb") as raw:
        _refuse_wrong_compression(raw.read(_HEAD_BYTES), file)
    compression = _compression_of(file.path)
    unpacked = io.FileIO(file.path) if compression is None else _COMPRESSIONS[compression][2](file.path)
    return io.BufferedReader(unpacked, _BUFFER_BYTES)


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
        if start.startswith(magic) and _kind_of(file.path) not in _BINARY_KINDS.get(magic, ()):
            raise DataError(f"{file.path} is {what}, by its first bytes", hint=hint)
    for kind, starts, _ in _COMPRESSIONS.values():
        if head.startswith(starts):
            raise DataError(f"{file.path} is compressed twice, with {kind} inside", hint="unpack it once")


def _refuse_utf16(head: bytes, file: RowFile) -> None:
    # Without a BOM it shows by its zero bytes: a file of rows starts with signs of ASCII.
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise DataError(
            f"{file.name}:1: not UTF-8 (byte 0x{head[0]:02x}), it looks like UTF-16",
            hint=utf8_hint(file, encoding="UTF-16"),
        )


_READERS: dict[str, Callable[[io.BufferedReader, RowFile], Iterator[SourceItem]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
# Kinds of which a beginning can be read alone.
LINE_KINDS = (".jsonl", ".ndjson", ".csv", ".tsv")
# First bytes → the kinds that start with them; an Arrow stream has no mark of its own.
_BINARY_KINDS = {b"PAR1\x15": (".parquet",), b"ARROW1\0\0": (".arrow", ".feather")}
