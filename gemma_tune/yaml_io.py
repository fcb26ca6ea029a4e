"""YAML 1.2 in and out: mistakes in a sentence with their line, text that readers of YAML 1.1 take for the same.

YAML 1.2 reads `2e-4` as a number and `no` as text; kubectl and SkyPilot read 1.1, where `no` is false and 1:30 is 90.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gemma_tune.errors import GemmaTuneError

_PLAIN = re.compile(r"[A-Za-z/~][A-Za-z0-9_./-]*")
# What a block of lines may hold; NEL and the separators of Unicode are line breaks to some readers.
_PRINTABLE = re.compile("[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


@contextmanager
def yaml_errors(label: str, *, error: type[GemmaTuneError]) -> Iterator[None]:
    """Raise what a reader of YAML finds wrong as an `error` that names the line."""
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        yield
    except DuplicateKeyError as cause:
        line = cause.problem_mark.line + 1 if cause.problem_mark else "?"
        key = str(cause.problem).split('"')[1] if '"' in str(cause.problem) else "a key"
        raise error(f"{label}:{line}: {key!r} is given twice", hint="keep one of them") from None
    except MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        raise error(f"{where}: not YAML: {cause.problem or cause.context}") from None
    except (YAMLError, RecursionError) as cause:
        raise error(f"{label}: not YAML: {cause}") from None


def read_plain_yaml(text: str, *, label: str, error: type[GemmaTuneError]) -> Any:
    """Read mappings, lists and scalars. Tags and aliases are refused: an alias can make a small file huge."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent

    with yaml_errors(label, error=error):
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(io.StringIO(text))):
            raise error(f"{label}: aliases (*name) are not allowed here", hint="write the value out")
        return YAML(typ="safe", pure=True).load(io.StringIO(text))


def read_yaml_tree(text: str) -> Any:
    """Read ruamel's round-trip tree, whose nodes know their lines. Errors are ruamel's: see `yaml_errors`."""
    from ruamel.yaml import YAML

    return YAML(typ="rt").load(io.StringIO(text))


def dump_yaml(value: Any, *, styled: bool = False) -> str:
    """Return YAML in blocks, keys in their order. No line is folded: folded, it is hard to read and to search.

    Args:
        styled: the value holds ruamel's scalar strings, which say how they are written.
    """
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt" if styled else "safe", pure=True)
    yaml.width = 1_000_000
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue()


def yaml_scalar(text: str) -> str:
    """Return text as a scalar on one line, in double quotes where it could mean something else."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return dump_yaml(DoubleQuotedScalarString(text), styled=True).removesuffix("\n")


def yaml_block(text: str, indent: int) -> str:
    """Return lines of text as a literal block of so many columns; what a block cannot hold, as a scalar."""
    from ruamel.yaml.scalarstring import LiteralScalarString

    if "\n" not in text or not _PRINTABLE.fullmatch(text):
        return yaml_scalar(text)
    # In two columns, with an entry behind it: a block that keeps its last empty lines would end the document.
    block = dump_yaml({"": LiteralScalarString(text), "end": 0}, styled=True)
    block = block.partition(": ")[2].removesuffix("\nend: 0\n")
    return re.sub(r"\n(?=[^\n])", "\n" + " " * (indent - 2), block)


YAML_FILTERS: Mapping[str, Callable[..., str]] = {"yaml": yaml_scalar, "block": yaml_block}
