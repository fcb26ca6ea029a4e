"""YAML 1.2 in and out: mistakes in a sentence with their line, text that readers of YAML 1.1 take for the same.

YAML 1.2 reads `2e-4` as a number and `no` as text; kubectl and SkyPilot read 1.1, where `no` is false and 1:30 is 90.
"""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.errors import GemmaTuneError
from gemma_tune.text import shorten

ErrorClass = type[GemmaTuneError]
MAX_DEPTH = 20
MAX_NUMBER_CHARS = 64
_PLAIN = re.compile(r"[A-Za-z/~][A-Za-z0-9_./-]*")
# What a block of lines may hold; NEL and the separators of Unicode are line breaks to some readers.
_PRINTABLE = re.compile("[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


class _YamlReader:
    """Makes plain values of ruamel's events, and keeps the line of every path.

    Of YAML 1.2 it takes mappings, lists and scalars of the core schema; a date is text. Tags, anchors and aliases are
    refused: a tag runs a constructor, and an alias can make a small file huge.
    """

    def __init__(self, text: str, *, label: str, error: ErrorClass) -> None:
        from ruamel.yaml import YAML

        self.yaml = YAML(typ="safe", pure=True)
        self.events = self.yaml.parse(io.StringIO(text))
        self.label, self.error = label, error
        self.lines: dict[str, int] = {}

    def wrong(self, event: Any, message: str, hint: str | None = None) -> GemmaTuneError:
        return self.error(f"{self.label}:{event.start_mark.line + 1}: {message}", hint=hint)

    def document(self) -> Any:
        from ruamel.yaml.events import StreamEndEvent

        next(self.events)  # the start of the stream
        if isinstance(next(self.events), StreamEndEvent):
            return None
        value = self.value(next(self.events), "", 0)
        next(self.events)  # the end of the document
        if not isinstance(more := next(self.events), StreamEndEvent):
            raise self.wrong(more, "a second document begins here", "keep one of them")
        return value

    def value(self, event: Any, path: str, depth: int) -> Any:
        from ruamel.yaml.events import AliasEvent, MappingEndEvent, ScalarEvent, SequenceEndEvent, SequenceStartEvent

        if isinstance(event, AliasEvent) or event.anchor:
            raise self.wrong(event, "anchors (&name) and aliases (*name) are not allowed", "write the value out")
        if event.tag is not None:
            raise self.wrong(event, "tags (!name) are not allowed", "write the value alone, or text in quotes")
        if depth > MAX_DEPTH:
            raise self.wrong(event, f"lists and mappings are nested more than {MAX_DEPTH} deep")
        if isinstance(event, ScalarEvent):
            return self.scalar(event)
        below = f"{path}." if path else ""
        if isinstance(event, SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                where = f"{below}{len(items)}"
                self.lines[where] = item.start_mark.line + 1
                items.append(self.value(item, where, depth + 1))
            return items
        values: dict[str, Any] = {}
        while not isinstance(key := next(self.events), MappingEndEvent):
            if not isinstance(key, ScalarEvent):
                raise self.wrong(key, "a key is a list, a mapping or an alias, text is expected")
            self.value(key, path, depth)  # refuses its tag and anchor
            if key.value in values:
                raise self.wrong(key, f"{shorten(key.value, num_chars=40)!r} is given twice", "keep one of them")
            self.lines[where := below + key.value] = key.start_mark.line + 1
            values[key.value] = self.value(next(self.events), where, depth + 1)
        return values

    def scalar(self, event: Any) -> Any:
        from ruamel.yaml.nodes import ScalarNode

        text: str = event.value
        # Of what is not in quotes, by ruamel's patterns for YAML 1.2.
        kind = str(self.yaml.resolver.resolve(ScalarNode, text, (True, False))).rpartition(":")[2]
        if not event.implicit[0] or kind not in _READ_AS:
            return text
        if len(text) > MAX_NUMBER_CHARS:
            raise self.wrong(event, f"a number of {len(text):,} characters", f"at most {MAX_NUMBER_CHARS} are read")
        return _READ_AS[kind](text.replace("_", ""))


def _read_int(text: str) -> int:
    base = {"0b": 2, "0o": 8, "0x": 16}.get(text.lstrip("+-")[:2].lower(), 10)
    return int(text, base)


def _read_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_READ_AS: Mapping[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _read_int,
    "float": _read_float,
}


def read_yaml(text: str, *, label: str, error: ErrorClass) -> tuple[Any, dict[str, int]]:
    """Read mappings, lists and scalars, and the 1-based line of every path such as `data.mix.0.source`.

    Raises:
        GemmaTuneError: of the given class, with the line; it quotes no more than a character of the text, or a key.
    """
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    reader = _YamlReader(text, label=label, error=error)
    try:
        return reader.document(), reader.lines
    except GemmaTuneError:
        raise
    except MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        told = str(cause.problem or cause.context).splitlines()[0]
        raise error(f"{where}: not YAML: {shorten(told, num_chars=100)}") from None
    except ReaderError as cause:
        line = text.count("\n", 0, cause.position) + 1
        raise error(f"{label}:{line}: not YAML: the character U+{ord(text[cause.position]):04X}") from None
    except Exception as cause:  # a dozen kinds for hostile text: OverflowError of "\\U99999999" is one
        raise error(f"{label}: not YAML ({type(cause).__name__})") from None


def read_yaml_text(path: Path, *, max_bytes: int, what: str, error: ErrorClass) -> str:
    """Read the text of a small file, such as a recipe; line ends become `\\n`.

    Raises:
        GemmaTuneError: of the given class: it is not a file of this size, cannot be read, or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise error(f"{path} is not a file, and {what} is one", hint="give a .yaml file")
        if path.stat().st_size > max_bytes:
            raise error(f"{path} is larger than {max_bytes // 1024} KiB, which no {what.split(' ', 1)[1]} is")
        content = path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise error(
            f"{path}:{line}: not UTF-8 (byte 0x{content[cause.start]:02x})", hint="save the file as UTF-8"
        ) from None
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from None


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
