"""YAML that every reader takes for the same: kubectl and SkyPilot read 1.1, where `no` is false and 1:30 is 90."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

_PLAIN = re.compile(r"[A-Za-z/~][A-Za-z0-9_./-]*")
# What a block of lines may hold; NEL and the separators of Unicode are line breaks to some readers.
_PRINTABLE = re.compile("[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


def dump_documents(documents: Sequence[Mapping[str, Any]], *, header: str) -> str:
    """Documents of mappings, lists and scalars, below the header's lines as comments."""
    yaml = YAML()
    yaml.width = 1_000_000  # a folded line is harder to read than a long one
    yaml.indent(mapping=2, sequence=4, offset=2)
    parts = []
    for document in documents:
        out = io.StringIO()
        yaml.dump(_told(document), out)
        parts.append(out.getvalue())
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return comment + "---\n".join(parts)


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_told(key): _told(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" in value and _PRINTABLE.fullmatch(value):
        return LiteralScalarString(value)
    return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else DoubleQuotedScalarString(value)
