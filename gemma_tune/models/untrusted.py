"""What a file that came with a model may not make the loader do: run code, or download a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.errors import ModelError

# Keys through which a config makes transformers import code: from the model's own repository, or (in any of the second
# group, CVE-2026-4372) from a kernel repository that the value names.
_CODE_KEYS = frozenset({"auto_map"})
_IMPLEMENTATION_KEYS = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)
_IMPLEMENTATIONS = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "batched_mm", "grouped_mm"}
)


def check_no_code(content: Any, where: str) -> None:
    """Raise ModelError when a JSON document asks the loader to run code that came with the model."""
    for key, value in _walk(content):
        if key in _CODE_KEYS and value:
            raise ModelError(
                f"{where}: has {key!r}, which makes the loader run code that came with the model",
                hint="gemma-tune runs no model code. Remove the key if you know that the model is a plain Gemma.",
            )
        if key in _IMPLEMENTATION_KEYS and value is not None and not _is_known_implementation(value):
            raise ModelError(
                f"{where}: {key} is {value!r}, which may name a kernel to download",
                hint=f"Remove the key, or use one of: {', '.join(sorted(_IMPLEMENTATIONS))}.",
            )


def _is_known_implementation(value: Any) -> bool:
    """A multimodal config may give one name for each of its parts."""
    names = value.values() if isinstance(value, Mapping) else (value,)
    return all(isinstance(name, str) and name in _IMPLEMENTATIONS for name in names)


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
