"""Rows out of JSON lines and out of one JSON list."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from gemma_tune.data.sources.items import (
    ESCAPED_BYTE,
    JSON_HINT,
    STOPPED,
    BrokenLine,
    RowFile,
    SourceItem,
    SourceRow,
    escaped_byte,
    not_utf8,
    shown,
)
from gemma_tune.errors import DataError


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


def read_jsonl(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    """Read one object a line."""
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
            problem = not_utf8(error.object[error.start])
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


def read_json(stream: io.BufferedReader, file: RowFile) -> Iterator[SourceItem]:
    """Read a list of objects."""
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
            if is_damaged and (byte := ESCAPED_BYTE.search(text, start, end)):
                twice.clear()
                bad_line = line + text.count("\n", start, byte.start())
                yield BrokenLine(f"{name}:{bad_line}", not_utf8(escaped_byte(byte)))
                continue
            problem = _value_problem(value, text=text[start:end], twice=twice)
            yield SourceRow(value, where) if problem is None else BrokenLine(where, problem)
    except json.JSONDecodeError as error:
        byte = ESCAPED_BYTE.match(text, error.pos)
        problem = not_utf8(escaped_byte(byte)) if byte else _json_problem(error)
        yield BrokenLine(f"{name}:{error.lineno}:{error.colno}", f"{problem}; {STOPPED}", ends_reading=True)


def _object_error(text: str, file: RowFile) -> DataError:
    """What a .json file is that starts with an object instead of a list."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return DataError(f"{file.name}:{error.lineno}:{error.colno}: {_json_problem(error)}", hint=JSON_HINT)
    except (ValueError, RecursionError) as error:
        return DataError(f"{file.name}: {_json_problem(error)}", hint=JSON_HINT)
    if text[end:].strip():
        is_lines = "\n" not in text[start:end]
        hint = "name it .jsonl instead of .json" if is_lines else JSON_HINT
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
    return DataError(f"{file.path} is one object{names}, not a list of objects", hint=JSON_HINT)


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
