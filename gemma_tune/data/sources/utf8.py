"""Bytes that are not UTF-8."""

from __future__ import annotations

import re


def not_utf8(byte: int) -> str:
    """Say what is wrong with a byte."""
    return f"not UTF-8 (byte 0x{byte:02x})"


# What surrogateescape makes of bytes that are not UTF-8.
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def escaped_byte(match: re.Match[str]) -> int:
    """Return the byte that stands behind a match of ESCAPED_BYTE."""
    return ord(match[0]) - 0xDC00


def utf8_hint(name: str) -> str:
    """Say how the file of this name becomes UTF-8."""
    return f"save the file as UTF-8, for example: iconv -f CP1252 -t UTF-8 {name} > utf8-{name}"
