"""Filters of YAML templates, whose text every reader takes for the same.

kubectl and SkyPilot read YAML 1.1, where `no` is false and 1:30 is 90.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

_PLAIN = re.compile(r"[A-Za-z/~][A-Za-z0-9_./-]*")
# What a block of lines may hold; NEL and the separators of Unicode are line breaks to some readers.
_PRINTABLE = re.compile("[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


def yaml_scalar(text: str) -> str:
    """Return text as a scalar on one line, in double quotes where it could mean something else."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return _dump(DoubleQuotedScalarString(text))


def yaml_block(text: str, indent: int) -> str:
    """Return lines of text as a literal block of so many columns; what a block cannot hold, as a scalar."""
    if "\n" not in text or not _PRINTABLE.fullmatch(text):
        return yaml_scalar(text)
    # In two columns, with an entry behind it: a block that keeps its last empty lines would end the document.
    block = _dump({"": LiteralScalarString(text), "end": 0}).partition(": ")[2].removesuffix("\nend: 0")
    return re.sub(r"\n(?=[^\n])", "\n" + " " * (indent - 2), block)


def _dump(value: Any) -> str:
    yaml = YAML()
    yaml.width = 1_000_000  # a folded line is harder to read than a long one
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue().removesuffix("\n")


YAML_FILTERS: Mapping[str, Callable[..., str]] = {"yaml": yaml_scalar, "block": yaml_block}
