"""Rows out of JSON lines and out of one JSON list."""

import io
import json
import re
import shlex
from collections.abc import Iterator
from functools import partial
from typing import Any

from gemma_tune.data.sources.items import (
    ESCAPED_BYTE,
    JSON_HINT,
    STOPPED,
    BrokenLine,
    RowFile,
    SourceItem,
    SourceNote,
    SourceRow,
    escaped_byte,
    not_utf8,
    shown,
    utf8_hint,
)
from gemma_tune.errors import DataError
from gemma_tune.text import format_bytes

# A line of a compressed file can be a thousand times as long as the file. The longest row that is rendered, its 16
# million characters written as \uXXXX, has 100 MB.
MAX_LINE_BYTES = 128_000_000


def _kind(value: object) -> str:
    """A JSON value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]


def _decoder() -> tuple[json.JSONDecoder, list[str]]:
    """A JSON decoder, and the list where it leaves every key that one object has twice."""
    twice: list[str] = []

    def to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    twice.append(key)
                seen.add(key)
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


def read_jsonl(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    """Read one object a line."""
    name, hint = file.name, utf8_hint(file)
    decoder, twice = _decoder()
    decode = decoder.decode
    is_first = True
    # Bytes are split at \n only: U+2028 and its like are allowed inside a JSON string and end no line.
    for number, raw in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), start=1):
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(
                f"{name}:{number}: a line of more than {format_bytes(MAX_LINE_BYTES)}, which no row is",
                hint="write one object a line",
            )
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
            problem = not_utf8(error.object[error.start])
        except (ValueError, RecursionError) as error:
            twice.clear()
            problem = _json_problem(error)
            where += f":{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        yield SourceRow(value, where) if problem is None else BrokenLine(where, problem, hint=_hint(problem, hint))


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


def read_json(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    """Read a list of objects; or one object that holds such a list, or whose keys are the columns."""
    name, hint = file.name, utf8_hint(file)
    content = stream.read()
    try:
        text, is_damaged = content.decode("utf-8"), False
    except UnicodeDecodeError:
        text, is_damaged = content.decode("utf-8", errors="surrogateescape"), True
    del content
    if not text.strip():
        return
    start = _skip(text, 0)
    if text.startswith("{", start):
        if is_damaged and (byte := ESCAPED_BYTE.search(text)):
            where = f"{name}:{text.count(chr(10), 0, byte.start()) + 1}"
            raise DataError(f"{where}: {not_utf8(escaped_byte(byte))}", hint=hint)
        columns, start, key = _read_object(text, start, file)
        if columns:
            yield from _rows_of_columns(columns, text, file)
            return
        yield SourceNote(f"{name}: its rows are the list behind the key {key!r}")
    decoder, twice = _decoder()
    try:
        for value, line, begin, end in _array_items(text, decoder, start):
            where = f"{name}:{line}"
            if is_damaged and (byte := ESCAPED_BYTE.search(text, begin, end)):
                twice.clear()
                bad_line = line + text.count("\n", begin, byte.start())
                yield BrokenLine(f"{name}:{bad_line}", not_utf8(escaped_byte(byte)), hint=hint)
                continue
            problem = _value_problem(value, text=text[begin:end], twice=twice)
            yield SourceRow(value, where) if problem is None else BrokenLine(where, problem)
    except json.JSONDecodeError as error:
        byte = ESCAPED_BYTE.match(text, error.pos)
        problem = not_utf8(escaped_byte(byte)) if byte else _json_problem(error)
        where = f"{name}:{error.lineno}:{error.colno}"
        yield BrokenLine(where, f"{problem}; {STOPPED}", ends_reading=True, hint=hint if byte else None)


def _read_object(text: str, start: int, file: RowFile) -> tuple[dict[str, list[Any]], int, str]:
    """The columns of the object that a file is instead of a list; or where the list of its rows starts, and its key.

    Raises:
        DataError: it holds no rows that are clearly all of it.
    """
    decoder, twice = _decoder()
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise DataError(f"{file.name}:{error.lineno}:{error.colno}: {_json_problem(error)}", hint=JSON_HINT) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name}: {_json_problem(error)}", hint=JSON_HINT) from None
    if text[end:].strip():
        is_lines = "\n" not in text[start:end]
        hint = "name it .jsonl instead of .json" if is_lines else JSON_HINT
        kind = "one object a line (JSON lines)" if is_lines else "one object behind the other"
        raise DataError(f"{file.path} holds {kind}, not one list", hint=hint)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    tables = [key for key in lists if value[key] and isinstance(value[key][0], dict)]
    if len(lists) == len(tables) == 1 and tables[0] not in twice:
        position = _skip(text, start + 1)
        while True:
            key, position = decoder.raw_decode(text, position)
            position = _skip(text, _skip(text, position) + 1)
            if key == tables[0]:
                return {}, position, key
            position = _skip(text, _skip(text, decoder.raw_decode(text, position)[1]) + 1)
    if twice:
        raise DataError(f"{file.name}: key {twice[0]!r} twice", hint=JSON_HINT)
    if columns := _columns_of(value):
        return columns, start, ""
    if len(lists) > 1:
        names = shown(map(repr, lists))
        hint = f"save the one that holds the rows alone: {_jq(f'.[{json.dumps(lists[0])}]', file)}"
        raise DataError(f"{file.path} is one object with the lists {names}, not a list of objects", hint=hint)
    if path := _path_to_rows(value):
        query = "".join(f"[{json.dumps(key)}]" if isinstance(key, str) else "[]" for key in path)
        raise DataError(
            f"{file.path} is one object with the rows deeper down, in {'.'.join(filter(None, path))}",
            hint=_jq(f"[.{query}]" if None in path else f".{query}", file),
        )
    if len(value) > 1 and _are(dict, list(value.values())):
        raise DataError(f"{file.path} is one object of objects, not a list of them", hint=_jq("[.[]]", file))
    raise DataError(f"{file.path} is one object, not a list of objects", hint=JSON_HINT)


def _path_to_rows(value: dict[str, Any], depth: int = 4) -> list[str | None]:
    """The keys that lead to a list of objects further down, None for each item of a list; empty where there is none."""
    for key, inner in value.items():
        if isinstance(inner, list) and _are(dict, inner):
            return [key, None, "node"] if all(isinstance(item.get("node"), dict) for item in inner) else [key]
        if isinstance(inner, dict) and depth and (path := _path_to_rows(inner, depth - 1)):
            return [key, *path]
    return []


def _columns_of(value: dict[str, Any]) -> dict[str, list[Any]]:
    """Column → values, where an object holds a table by its columns, as pandas writes it too; empty where not."""
    columns = list(value.values())
    if set(value) == {"columns", "index", "data"} and _are(list, columns) and _are(list, value["data"]):  # orient=split
        names, rows = value["columns"], value["data"]
        if _are(str, names) and len(set(names)) == len(names) and all(len(row) == len(names) for row in rows):
            return {name: [row[number] for row in rows] for number, name in enumerate(names)}
    if _are(list, columns):
        return value if len({len(column) for column in columns}) == 1 else {}
    if not _are(dict, columns) or not columns[0]:
        return {}
    index = list(columns[0])
    if all(key.isdecimal() for key in index):  # orient=columns
        same = all(column.keys() == columns[0].keys() for column in columns)
        return {name: [column[key] for key in index] for name, column in value.items()} if same else {}
    if all(key.isdecimal() for key in value):  # orient=index
        names = list(dict.fromkeys(name for row in columns for name in row))
        return {name: [row.get(name) for row in columns] for name in names}
    return {}


def _rows_of_columns(columns: dict[str, list[Any]], text: str, file: RowFile) -> Iterator[SourceItem]:
    has_escapes = "\\u" in text
    for index, cells in enumerate(zip(*columns.values(), strict=True)):
        row, where = dict(zip(columns, cells, strict=True)), f"{file.name}[{index}]"
        problem = _value_problem(row, text=json.dumps(row) if has_escapes else "", twice=[])
        yield SourceRow(row, where) if problem is None else BrokenLine(where, problem)


def _are(kind: type, values: Any) -> bool:
    return bool(values) and all(isinstance(value, kind) for value in values)


def _hint(problem: str, hint: str) -> str | None:
    return hint if "UTF-8" in problem else None


def _jq(path: str, file: RowFile) -> str:
    """The command that saves a part of a JSON file as rows."""
    into = file.path.with_name(f"rows-of-{file.path.name}")
    return f"jq {shlex.quote(path)} {shlex.quote(str(file.path))} > {shlex.quote(str(into))}"


_JSON_SPACE = re.compile(r"[ \t\n\r]*")


def _skip(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return match.end() if match else position


def _array_items(text: str, decoder: json.JSONDecoder, position: int) -> Iterator[tuple[Any, int, int, int]]:
    """The items of the JSON list at `position`: value, 1-based line where it starts, start and end of its text."""

    def skip(position: int) -> int:
        return _skip(text, position)

    is_whole = not text[:position].strip()
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
    if is_whole and position != len(text):
        raise json.JSONDecodeError("Extra data behind the list", text, position)
