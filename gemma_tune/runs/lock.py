"""Everything that a run depends on, in lock.json."""

import platform
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from gemma_tune.disk import read_json_object
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.errors import RunError
from gemma_tune.identity import installed_version
from gemma_tune.recipe.methods import DEFAULT_METHOD
from gemma_tune.runs.layout import RunDir

# The packages whose versions decide what a run computes.
RECORDED_PACKAGES = (
    "gemma-tune", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "numpy", *(name for engine in ENGINES.values() for name in engine.packages),
)  # fmt: skip


@dataclass(frozen=True)
class Lock:
    """Everything a run depends on. Hashes are SHA-256 in hex."""

    recipe: str
    overrides: list[str]
    base: dict[str, Any]  # name, revision (hub commit, or null), directory-independent file hashes of the base model
    data: dict[str, Any]  # label and hash of the rows and of the template
    engine: dict[str, str]  # engine, precision: what was chosen, and why
    precision: dict[str, Any]
    hardware: dict[str, Any]  # device, processor, memory
    seed: int
    processes: int = 1  # how many trained together
    method: str = DEFAULT_METHOD  # the training method
    adapter: dict[str, str] | None = None  # name and hash of the adapter that the training started from, or null
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    # versions; null for what is not installed
    packages: dict[str, str | None] = field(
        default_factory=lambda: {name: installed_version(name) for name in RECORDED_PACKAGES}
    )


# What is read of the parts.
_KEYS_OF = {
    "base": ("name", "revision", "files"),
    "data": ("label", "sha256"),
    "engine": ("name", "reason"),
    "precision": ("compute", "reason"),
    "hardware": ("name",),
    "packages": (),
}

_LOST_HINT = "restore it from a copy of the run, or start a new run; a copy of RUN/adapter can be used by itself"


def read_lock(run: RunDir) -> dict[str, Any]:
    """Read a lock.json; a key that came later has its default.

    Raises:
        RunError: there is none, or it lacks what every run has recorded.
    """
    defaults = {each.name: each.default for each in fields(Lock) if each.default is not MISSING}
    lock = {**defaults, **read_json_object(run.lock, hint=_LOST_HINT)}
    missing = [each.name for each in fields(Lock) if each.name not in lock]
    for part, keys in _KEYS_OF.items():
        if part in lock:
            content = lock[part] if isinstance(lock[part], Mapping) else {}
            missing += [f"{part}.{key}" for key in keys if key not in content]
    if missing:
        raise RunError(
            f"{run.lock} does not say {missing[0]}: it is damaged, or not of a run of gemma-tune", hint=_LOST_HINT
        )
    return lock
