"""What a cell holds, as a template needs it: tables have numbers where text is meant, and messages as text."""

from __future__ import annotations

import ast
import datetime
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from decimal import Decimal

ROLE_KEYS = ("from", "role")  # those that make an object a message
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
        value = fields.get(name)
        if isinstance(value, str):
            read = as_messages(value) if name in messages else value
        elif name in texts and value is not None:
            read = as_text(value)
            if isinstance(read, str):
                spelled.append(name)
        else:
            read = None if value != value else value
        if read is not value:
            changed[name] = read
    return ({**fields, **changed} if changed else fields), spelled


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
