"""The export formats by name. A new one is a file next to this one, a line in `FORMATS`, and its test."""

from collections.abc import Sequence

from gemma_tune.errors import ExportError
from gemma_tune.exporting.formats import adapter, gguf, merged, nf4, ollama
from gemma_tune.exporting.formats.format import Format
from gemma_tune.exporting.required_packages import require_packages
from gemma_tune.members import Members

FORMATS: Members[Format] = Members(
    "export format", (adapter.FORMAT, merged.FORMAT, nf4.FORMAT, *gguf.FORMATS, ollama.FORMAT)
)


def name_formats(names: Sequence[str]) -> tuple[Format, ...]:
    """Return the named formats, each once, in the order given. Raises ExportError when a name is unknown."""
    return tuple(map(_find_format, dict.fromkeys(name.strip().lower() for name in names)))


def find_formats(names: Sequence[str]) -> tuple[Format, ...]:
    """Return the named formats, each once, in the order given.

    Raises:
        ExportError: a name is unknown, or a package that a format needs is not installed.
    """
    found = name_formats(names)
    for each in found:
        require_packages(each.name, each.packages)
    return found


def _find_format(name: str) -> Format:
    if name not in FORMATS:
        gguf.refuse_unknown_quantization(name)
    return FORMATS.find(name, error=ExportError)
