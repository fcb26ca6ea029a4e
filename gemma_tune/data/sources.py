"""Rows from a file, from the hub or from the package, each with the place it came from.

Files are read with the standard library and decoded here, so that every mistake is told with file and line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import DataError, did_you_mean
from gemma_tune.paths import TINY_ROWS_DIR

TINY_WORLD = "tiny-world"
TINY_SPLITS = ("train", "eval")
MAX_SHOWN = 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# csv's default of 131,072 characters is shorter than some contexts; the limit is a C long, 32 bits on Windows.
_CSV_FIELD_CHARS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was found.

    Attributes:
        fields: column → value, unchecked.
        where: `rows.jsonl:12` (file and 1-based line), `rows.parquet[3]` or `owner/name[train]:3` (0-based index).
    """

    fields: dict[str, object]
    where: str


@dataclass(frozen=True)
class SourceData:
    """All rows of one source.

    Attributes:
        rows: at least one.
        columns: every column that occurs, in the order of first appearance.
        label: the source as it is called in messages.
        sha256: of the file's (uncompressed) bytes; of the rows as JSON for a hub dataset.
    """

    rows: list[SourceRow]
    columns: tuple[str, ...]
    label: str
    sha256: str


def load_source(
    source: str, *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> SourceData:
    """Read every row of `source`: a file, a hub id `owner/name`, or `tiny-world`.

    Files are .jsonl, .json (a list of objects), .csv, .tsv or .parquet, each also with .gz behind it, in UTF-8 with or
    without BOM. `subset`, `revision` and a `split` other than train belong to hub datasets (tiny-world has the splits
    train and eval).

    Raises:
        DataError: the source is missing, unreadable, empty or broken; broken lines are counted, the first ones shown.
    """
    if source == TINY_WORLD:
        if split not in TINY_SPLITS:
            raise DataError(f"{TINY_WORLD} has no split {split!r}", hint=f"its splits: {', '.join(TINY_SPLITS)}")
        _refuse_hub_settings(source, subset=subset, split="train", revision=revision)
        return _read_file(TINY_ROWS_DIR / f"{split}.jsonl", label=f"{TINY_WORLD}[{split}]")
    path = Path(source).expanduser()
    if _reader_of(path) is not None or path.exists():
        _refuse_hub_settings(source, subset=subset, split=split, revision=revision)
        return _read_file(path, label=path.name)
    if _HUB_ID.fullmatch(source):
        return _read_hub(source, subset=subset, split=split, revision=revision)
    raise DataError(
        f"no such data source: {source}",
        hint=f"give a file ({', '.join(_READERS)}; .gz too), a hub id owner/name, or {TINY_WORLD}",
    )


def _refuse_hub_settings(source: str, *, subset: str | None, split: str, revision: str | None) -> None:
    given = [name for name, value in (("subset", subset), ("revision", revision)) if value is not None]
    given += ["split"] if split != "train" else []
    if given:
        names = " and ".join(f"data.{name}" for name in given)
        raise DataError(f"{source} has no {' or '.join(given)}", hint=f"remove {names}: they belong to a hub dataset")


# --- files ------------------------------------------------------------------------------------------------------------


def _reader_of(path: Path) -> Callable[[bytes, str], list[SourceRow]] | None:
    name = path.name.lower().removesuffix(".gz")
    return _READERS.get(Path(name).suffix)


def _read_file(path: Path, *, label: str) -> SourceData:
    content = _read_bytes(path)
    read = _reader_of(path)
    if read is None:
        raise DataError(
            f"{path}: unknown kind of file", hint=f"rename or convert it; known: {', '.join(_READERS)} (.gz too)"
        )
    if not content.strip():
        raise DataError(f"{path} is empty", hint="it needs at least one row")
    rows = read(content, path.name)
    if not rows:
        raise DataError(f"{path} holds no rows", hint="it needs at least one row")
    return SourceData(rows=rows, columns=_columns(rows), label=label, sha256=hashlib.sha256(content).hexdigest())


def _read_bytes(path: Path) -> bytes:
    """The file's bytes, uncompressed when its name ends in .gz."""
    if path.is_dir():
        files = sorted(child.name for child in path.iterdir() if _reader_of(child))
        hint = (
            f"name one of its files: {', '.join(files[:MAX_SHOWN])}" if files else f"give a file: {', '.join(_READERS)}"
        )
        raise DataError(f"{path} is a directory, not a file of rows", hint=hint)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file: {path}", hint=did_you_mean(path.name, beside) or "check data.source") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}", hint="download or compress it again") from None


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts error.start from behind the BOM; error.object is the same slice.
        line = error.object[: error.start].count(b"\n") + 1
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if utf16 else "CP1252"
        raise DataError(
            f"{name}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x})",
            hint=f"save the file as UTF-8, for example: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}",
        ) from None


def _columns(rows: Iterable[SourceRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for row in rows for column in row.fields))


def _raise_broken(problems: list[str], name: str, *, hint: str) -> None:
    if not problems:
        return
    more = [f"  and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    count = "1 broken line" if len(problems) == 1 else f"{len(problems)} broken lines"
    raise DataError(
        "\n".join([f"{name}: {count}", *(f"  {problem}" for problem in problems[:MAX_SHOWN]), *more]), hint=hint
    )


def _kind(value: object) -> str:
    """A JSON value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]


def _json_problem(where: str, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{where}: not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return f"{where}: nested too deeply"
    return f"{where}: {error}"  # an integer of more digits than Python converts


def _read_jsonl(content: bytes, name: str) -> list[SourceRow]:
    rows: list[SourceRow] = []
    problems: list[str] = []
    # Not str.splitlines: U+2028 and its like are allowed inside a JSON string and do not end a line of JSON lines.
    for number, line in enumerate(_decode(content, name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = f":{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            problems.append(_json_problem(f"{name}:{number}{column}", error))
            continue
        if isinstance(value, dict):
            rows.append(SourceRow(value, f"{name}:{number}"))
        else:
            problems.append(f"{name}:{number}: {_kind(value)}, not an object")
    _raise_broken(problems, name, hint='every line is one JSON object, such as {"instruction": "…", "response": "…"}')
    return rows


def _read_json(content: bytes, name: str) -> list[SourceRow]:
    text = _decode(content, name)
    rows: list[SourceRow] = []
    problems: list[str] = []
    try:
        for value, line in _array_items(text):
            if isinstance(value, dict):
                rows.append(SourceRow(value, f"{name}:{line}"))
            else:
                problems.append(f"{name}:{line}: {_kind(value)}, not an object")
    except json.JSONDecodeError as error:
        hint = "a .json file is one list of objects: [{…}, {…}]"
        if text.lstrip().startswith("{"):
            hint += "; a file with one object a line is JSON lines: name it .jsonl"
        raise DataError(_json_problem(f"{name}:{error.lineno}:{error.colno}", error), hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise DataError(_json_problem(name, error)) from None
    _raise_broken(problems, name, hint="a .json file is one list of objects: [{…}, {…}]")
    return rows


_JSON_SPACE = re.compile(r"[ \t\n\r]*")


def _array_items(text: str) -> Iterator[tuple[Any, int]]:
    """The items of a JSON list, each with the 1-based line where it starts."""
    decoder = json.JSONDecoder()

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
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        yield value, line
        position = skip(position)
        ended = text.startswith("]", position)
        if not ended:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = skip(position + 1)
    position = skip(position + 1)
    if position != len(text):
        raise json.JSONDecodeError("Extra data behind the list", text, position)


def _read_delimited(content: bytes, name: str, delimiter: str) -> list[SourceRow]:
    csv.field_size_limit(_CSV_FIELD_CHARS)
    reader = csv.reader(io.StringIO(_decode(content, name), newline=""), delimiter=delimiter, strict=True)
    rows: list[SourceRow] = []
    problems: list[str] = []
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, where)
            elif len(cells) != len(header):
                problems.append(f"{where}: {len(cells)} cells where the header has {len(header)}")
            else:
                rows.append(SourceRow(dict(zip(header, cells, strict=True)), where))
    except csv.Error as error:
        problems.append(f"{name}:{line}: {error}")
    _raise_broken(
        problems,
        name,
        hint=f"quote a cell that holds a line break, a quote or {delimiter!r}; the first line names the columns",
    )
    return rows


def _checked_header(cells: list[str], where: str) -> list[str]:
    wrong = [cell for index, cell in enumerate(cells) if not cell.strip() or cell in cells[:index]]
    if wrong:
        fault = f"two columns are called {wrong[0]!r}" if wrong[0].strip() else "a column has no name"
        raise DataError(f"{where}: {fault}", hint="the first line names every column, each name once")
    return cells


def _read_csv(content: bytes, name: str) -> list[SourceRow]:
    return _read_delimited(content, name, ",")


def _read_tsv(content: bytes, name: str) -> list[SourceRow]:
    return _read_delimited(content, name, "\t")


def _read_parquet(content: bytes, name: str) -> list[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole parquet file: {str(error).splitlines()[0]}") from None
    return [SourceRow(row, f"{name}[{index}]") for index, row in enumerate(table.to_pylist())]


_READERS: dict[str, Callable[[bytes, str], list[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


# --- hub --------------------------------------------------------------------------------------------------------------


def _read_hub(source: str, *, subset: str | None, split: str, revision: str | None) -> SourceData:
    import datasets

    label = f"{source}[{split}]"
    try:
        loaded = datasets.load_dataset(source, name=subset, split=split, revision=revision)
    except Exception as error:
        # load_dataset lets through whatever the hub client, the network stack and the file readers raise.
        raise _hub_error(error, source=source, subset=subset, split=split, revision=revision) from error
    columns = tuple(loaded.column_names)
    values = loaded.to_dict()
    rows = [
        SourceRow(dict(zip(columns, row, strict=True)), f"{label}:{index}")
        for index, row in enumerate(zip(*(values[column] for column in columns), strict=True))
    ]
    if not rows:
        raise DataError(f"{label} holds no rows")
    digest = hashlib.sha256()
    for source_row in rows:
        digest.update(json.dumps(source_row.fields, sort_keys=True, default=str).encode("utf-8"))
    return SourceData(rows=rows, columns=columns, label=label, sha256=digest.hexdigest())


def _hub_error(error: Exception, *, source: str, subset: str | None, split: str, revision: str | None) -> DataError:
    """What went wrong on the hub, with the next step."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    what = f"cannot load the hub dataset {source}"
    if "gated" in said.lower():
        return DataError(
            f"{what}: it is gated",
            hint=f"accept its terms at https://huggingface.co/datasets/{source}, then: hf auth login",
        )
    if "DatasetNotFoundError" in kinds:
        at = f" at revision {revision}" if revision else ""
        return DataError(
            f"{what}: not found{at}",
            hint="check the name; for a private one: hf auth login; for a file of your own, check its path",
        )
    if kinds & {
        "ConnectionError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "TimeoutException",
        "LocalEntryNotFoundError",
    }:
        return DataError(
            f"{what}: the hub cannot be reached ({said})",
            hint="connect once to fill the cache, or give a local .jsonl/.csv/.parquet file",
        )
    if isinstance(error, ValueError) and ("split" in said.lower() or "config" in said.lower()):
        given = f"data.subset={subset or 'null'}, data.split={split}"
        return DataError(
            f"{what}: {said}",
            hint=f"given: {given}; its page lists subsets and splits: https://huggingface.co/datasets/{source}",
        )
    return DataError(f"{what}: {said}", hint="download it as a .parquet or .jsonl file and give that as data.source")
