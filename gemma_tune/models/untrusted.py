"""What a file that came with a model may not make the loader do: run code, or download a kernel."""

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.errors import ModelError
from gemma_tune.paths import read_table

_TABLE = read_table("models/untrusted.toml")


def check_no_code(content: Any, where: str) -> None:
    """Raise ModelError when a JSON document asks the loader to run code that came with the model."""
    for key, value in _walk(content):
        if key in _TABLE["code_keys"] and value:
            raise ModelError(
                f"{where}: has {key!r}, which makes the loader run code that came with the model",
                hint="gemma-tune runs no model code. Remove the key if you know that the model is a plain Gemma.",
            )
        if key in _TABLE["implementation_keys"] and value is not None and not _is_known_implementation(value):
            raise ModelError(
                f"{where}: {key} is {value!r}, which may name a kernel to download",
                hint=f"Remove the key, or use one of: {', '.join(sorted(_TABLE['implementations']))}.",
            )


def _is_known_implementation(value: Any) -> bool:
    """A multimodal config may give one name for each of its parts."""
    names = value.values() if isinstance(value, Mapping) else (value,)
    return all(isinstance(name, str) and name in _TABLE["implementations"] for name in names)


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    pending = [content]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            yield from node.items()
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
