"""What a target is made of, in a form to keep and to compare: other weights give other figures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from gemma_tune.inference.target import GgufTarget, Target


def target_identity(target: Target | GgufTarget) -> dict[str, Any]:
    """Template, weights of the base by size and time of change (hashing 17 GB takes a minute), adapter by hash."""
    if isinstance(target, GgufTarget):
        return {"template": target.template.sha256, "weights": _stamps([target.path])}
    adapter = sorted(target.adapter.glob("adapter_*")) if target.adapter else []
    return {
        "template": target.template.sha256,
        "base": target.base.name,
        "revision": target.base.revision,
        "weights": _stamps(sorted(target.base.directory.glob("*.safetensors"))),
        "load_in_4bit": target.section.load_in_4bit,
        "dtype": target.section.dtype,
        "adapter": {path.name: file_sha256(path) for path in adapter},
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
