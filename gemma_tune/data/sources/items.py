"""What a source of rows gives: rows, and the pieces of it that are none."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma_tune.data.data_report import MAX_SAMPLES
from gemma_tune.errors import DataError
from gemma_tune.text import counted

MAX_SHOWN = 5
_MAX_ALIKE = 3
STOPPED = "reading stopped here"
JSON_HINT = "a .json file is one list of objects: [{…}, {…}]"
# What surrogateescape makes of bytes that are not UTF-8.
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")

# Suffix → what prints the unpacked file.
UNPACKERS = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc", ".zst": "zstd -dc"}


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was found."""

    fields: dict[str, object]  # column → value, unchecked
    where: str  # `rows.jsonl:12` (file and 1-based line), `rows.parquet[3]` or `owner/name[train]:3` (0-based index)


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A piece of a source that is no row."""

    where: str  # as in a row; with the 1-based column behind the line where it is known (`rows.jsonl:12:7`)
    problem: str  # what is wrong with it, such as `a list, not an object`
    ends_reading: bool = False  # nothing behind it could be read: the structure of a .json list or a CSV file is broken
    hint: str | None = field(default=None, compare=False)  # how the file is repaired, where that follows


@dataclass(frozen=True, slots=True)
class SourceNote:
    """What is to be said once of a source, such as a column that is not read."""

    text: str


SourceItem = SourceRow | BrokenLine | SourceNote


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file of rows that was found and hashed."""

    path: Path
    name: str  # as messages call it
    sha256: str  # of its bytes on disk
    stamp: list[int]  # size and modification time when it was hashed


def shown(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = [f"and {len(every) - MAX_SHOWN:,} more"] if len(every) > MAX_SHOWN else []
    return ", ".join([*every[:MAX_SHOWN], *more])


def stop_if_broken(broken: Sequence[BrokenLine], *, unusable: Sequence[str] = ()) -> None:
    """Raise a DataError where a line is no row at all: the file is damaged or of another kind, so nothing is guessed.

    `unusable` are the problems of rows; they are reported as well, so that a file is fixed in one go.
    """
    if not broken:
        return
    names = ", ".join(dict.fromkeys(line.where.partition(":")[0] for line in broken))
    message = f"{names}: {counted(len(broken), 'broken line')}\n" + told(
        [f"{line.where}: {line.problem}" for line in broken]
    )
    if any(line.ends_reading for line in broken):
        message += "\n  what stands behind it was not read"
    if unusable:
        message += (
            f"\nand {len(unusable):,} row{'s' if len(unusable) > 1 else ''} that cannot be used\n{told(unusable)}"
        )
    raise DataError(message, hint=_hint(broken[0]))


def _hint(line: BrokenLine) -> str:
    name = line.where.partition(":")[0]
    if line.hint:
        return line.hint
    if ".csv" in name or ".tsv" in name:
        return "quote a cell that holds a line break, a quote or the delimiter; the first line names the columns"
    if ".jsonl" in name:
        return 'every line is one JSON object, such as {"instruction": "…", "response": "…"}'
    return JSON_HINT


def told(problems: Sequence[str]) -> str:
    """Problems a line each, indented: the first of them, and of those that say the same the first few."""
    said: Counter[str] = Counter()
    shown: list[str] = []
    for problem in problems:
        what = problem.partition(": ")[2]
        said[what] += 1
        if said[what] <= _MAX_ALIKE and len(shown) < MAX_SAMPLES:
            shown.append(f"  {problem}")
    more = len(problems) - len(shown)
    return "\n".join([*shown, *([f"  and {more:,} more"] if more else [])])


def not_utf8(byte: int) -> str:
    """Say what is wrong with a byte."""
    return f"not UTF-8 (byte 0x{byte:02x})"


def escaped_byte(match: re.Match[str]) -> int:
    """Return the byte that stands behind a match of ESCAPED_BYTE."""
    return ord(match[0]) - 0xDC00


def utf8_hint(file: RowFile, *, encoding: str = "CP1252") -> str:
    """Say how a file of text becomes UTF-8, as a command that works where the file was named."""
    path, suffix = file.path, file.path.suffix.lower()
    unpack = UNPACKERS.get(suffix)
    into = shlex.quote(str(path.with_name(f"utf8-{path.stem if unpack else path.name}")))
    read, given = (f"{unpack} {shlex.quote(str(path))} | ", "") if unpack else ("", f"{shlex.quote(str(path))} ")
    return f"save the file as UTF-8, for example: {read}iconv -f {encoding} -t UTF-8 {given}> {into}"


def is_index_name(name: str) -> bool:
    """Whether a first column of this name is the index of a pandas table."""
    return not name or name == "__index_level_0__" or re.fullmatch(r"Unnamed: 0(\.\d+)*", name) is not None
