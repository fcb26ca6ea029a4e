"""What a cell holds, as a template needs it: tables have numbers where text is meant, and messages as text."""

import ast
import datetime
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from decimal import Decimal

ROLE_KEYS, CONTENT_KEYS = ("from", "role"), ("value", "content", "text", "parts")  # of a message
# Python's own spelling of a list is read by its parser, which takes memory and time.
_MAX_LITERAL_CHARS = 1_000_000


def read_cells(
    fields: Mapping[str, object], *, texts: Collection[str], messages: Collection[str]
) -> tuple[Mapping[str, object], list[str]]:
    """Return a row with the columns in `texts` as text and those in `messages` as lists, as far as they can be both.

    The second part names the columns whose number, truth value or date became text. See `as_text` and `as_messages`.
    """
    changed: dict[str, object] = {}
    spelled = []
    for name in (*messages, *texts):
        value = read = changed.get(name, fields.get(name))
        if name in messages:
            read = _with_texts(as_messages(value) if isinstance(value, str) else value)
        if name in texts and not isinstance(read, str):
            read = as_text(read)
        if read is not value:
            changed[name] = read
            if read is not None and not isinstance(value, str):
                spelled.append(name)
    return ({**fields, **changed} if changed else fields), spelled


def _with_texts(value: object) -> object:
    """Messages whose numbers are text; None for NaN."""
    if isinstance(value, list):
        items = [_with_texts(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if isinstance(value, Mapping):
        found = {key: value[key] for key in CONTENT_KEYS if isinstance(value.get(key), bool | int | float)}
        return {**value, **{key: as_text(content) for key, content in found.items()}} if found else value
    return None if value != value else value


def as_text(value: object) -> object:
    """Return a number or truth value as JSON spells it (42, 1.5, true), a date as ISO 8601, and None for NaN and NaT.

    Everything else is returned as it is, text such as `nan` and numbers without end among it.
    """
    if value != value:
        return None
    if isinstance(value, bool | int) or (isinstance(value, float) and abs(value) != float("inf")):
        return json.dumps(value)
    if isinstance(value, Decimal):
        return str(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def as_messages(value: str) -> object:
    """Return the message or the list of messages that a text spells in JSON, or as Python prints it; else the text."""
    text = value.strip()
    if text[:1] not in ("[", "{"):
        return value
    found: object = None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if len(text) <= _MAX_LITERAL_CHARS:
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = ast.literal_eval(text)
    items = found if isinstance(found, list) else [found]
    is_messages = all(isinstance(item, Mapping) and any(key in item for key in ROLE_KEYS) for item in items)
    return found if items and is_messages else value
