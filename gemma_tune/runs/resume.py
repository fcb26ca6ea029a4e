"""Going on with an interrupted run: which one, that nobody else trains in it, and what may differ from its start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import take_lock
from gemma_tune.errors import RunError
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir, newest_run
from gemma_tune.runs.manifest import read_manifest

# Settings that may change between a run and its resumption: none of them decides what a step computes. Base and rows
# may be somewhere else, as the lock holds hashes of what is in them.
_ALLOWED_SETTINGS = (
    "training.max_steps", "training.epochs", "training.max_minutes",
    "training.save_every_steps", "training.save_every_minutes", "training.keep_checkpoints",
    "model.name", "model.adapter", "data.source", "data.eval_source", "data.cache",
)  # fmt: skip
_ALLOWED_SECTIONS = ("evaluation", "export", "logging", "run")
# Parts of the lock that have to be the same. The others (versions, precision, hardware) decide whether the run stays
# equal bit for bit, and are told.
_REQUIRED_PARTS = ("base", "adapter", "data", "engine.name", "seed", "processes")
_IGNORED_PARTS = (
    "recipe", "overrides", "base.name", "adapter.name", "data.label", "engine.reason", "precision.reason",
)  # fmt: skip


@dataclass(frozen=True)
class Differences:
    """What differs between the start of a run and its resumption, a sentence each."""

    allowed: list[str]
    refused: list[str]


@contextlib.contextmanager
def hold_run(run: RunDir) -> Iterator[None]:
    """Keep other processes from training in the same run; the hold ends with the process, however it ends.

    Raises:
        RunError: another process holds it.
    """
    descriptor = os.open(run.path, os.O_RDONLY)
    try:
        if not take_lock(descriptor):
            raise RunError(
                f"{run.path} is being trained by another process", hint="wait for it, or choose another run.name"
            )
        yield
    finally:
        os.close(descriptor)


def is_held(run: RunDir) -> bool:
    """Whether some process trains in the run now."""
    descriptor = os.open(run.path, os.O_RDONLY)
    try:
        return not take_lock(descriptor)
    finally:
        os.close(descriptor)


def interrupted_run(output_dir: Path, *, name: str | None, recipe_name: str) -> RunDir | None:
    """The named run, else the newest of the recipe, when it was begun, has not finished and is not running now."""
    run = RunDir(output_dir / name) if name is not None else newest_run(output_dir, recipe_name)
    if run is None or not (run.manifest.is_file() and run.resolved_recipe.is_file()):
        return None
    return run if read_manifest(run).status != "finished" and not is_held(run) else None


def recipe_differences(before: Recipe, now: Recipe) -> Differences:
    """Compare the settings of a run with those it is to go on with (F36)."""
    changed = _changes(_flat(before), _flat(now))
    allowed = {path for path in changed if path in _ALLOWED_SETTINGS or path.split(".")[0] in _ALLOWED_SECTIONS}
    return Differences(
        [line for path, line in changed.items() if path in allowed],
        [line for path, line in changed.items() if path not in allowed],
    )


def lock_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """Compare what a run depended on with what it would depend on now (F36)."""
    changed = {
        path: line
        for path, line in _changes(_flat_json(before), _flat_json(now)).items()
        if not _is_part(path, _IGNORED_PARTS)
    }
    return Differences(
        [line for path, line in changed.items() if not _is_part(path, _REQUIRED_PARTS)],
        [line for path, line in changed.items() if _is_part(path, _REQUIRED_PARTS)],
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """`path: old → new` of every value that differs, by path."""
    paths = [*before, *(path for path in now if path not in before)]
    return {
        path: f"{path}: {_shown(before.get(path))} → {_shown(now.get(path))}"
        for path in paths
        if before.get(path) != now.get(path)
    }


def _shown(value: Any) -> str:
    """As in Python, a hash by its first digits."""
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}…" if is_hash else repr(value)


def _is_part(path: str, parts: tuple[str, ...]) -> bool:
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {
        f"{section}.{field}": value
        for section, fields in recipe.model_dump().items()
        for field, value in fields.items()
    }


def _flat_json(value: Mapping[str, Any], *, parent: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat_json(item, parent=f"{parent}{key}.") if isinstance(item, Mapping) else {f"{parent}{key}": item}
    return flat
