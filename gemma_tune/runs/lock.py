"""Everything that a run depends on, in lock.json."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.identity import installed_version
from gemma_tune.recipe.methods import DEFAULT_METHOD

# The packages whose versions decide what a run computes.
RECORDED_PACKAGES = (
    "gemma-tune", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "numpy", *(name for engine in ENGINES.values() for name in engine.packages),
)  # fmt: skip


@dataclass(frozen=True)
class Lock:
    """Everything a run depends on. Hashes are SHA-256 in hex.

    Attributes:
        base: name, revision (hub commit, or null), directory-independent file hashes of the base model.
        processes: how many trained together.
        method: the training method.
        adapter: name and hash of the adapter that the training started from, or null.
        data: label and hash of the rows and of the template.
        engine, precision: what was chosen, and why.
        hardware: device, processor, memory.
        packages: versions; null for what is not installed.
    """

    recipe: str
    overrides: list[str]
    base: dict[str, Any]
    data: dict[str, Any]
    engine: dict[str, str]
    precision: dict[str, Any]
    hardware: dict[str, Any]
    seed: int
    processes: int = 1
    method: str = DEFAULT_METHOD
    adapter: dict[str, str] | None = None
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    packages: dict[str, str | None] = field(
        default_factory=lambda: {name: installed_version(name) for name in RECORDED_PACKAGES}
    )
