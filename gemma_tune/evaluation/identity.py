"""What a target is made of, in a form to keep and to compare: other weights give other figures."""

from __future__ import annotations

from typing import Any

from gemma_tune.inference.target import GgufTarget, Target
from gemma_tune.models.safetensors import file_sha256, file_stamp


def target_identity(target: Target | GgufTarget) -> dict[str, Any]:
    """Template, weights of the base by size and time of change (hashing 17 GB takes a minute), adapter by hash."""
    if isinstance(target, GgufTarget):
        return {"template": target.template.sha256, "weights": {target.path.name: file_stamp(target.path)}}
    adapter = sorted(target.adapter.glob("adapter_*")) if target.adapter else []
    return {
        "template": target.template.sha256,
        "base": target.base.name,
        "revision": target.base.revision,
        "weights": {path.name: file_stamp(path) for path in sorted(target.base.directory.glob("*.safetensors"))},
        "load_in_4bit": target.section.load_in_4bit,
        "dtype": target.section.dtype,
        "adapter": {path.name: file_sha256(path) for path in adapter},
    }
