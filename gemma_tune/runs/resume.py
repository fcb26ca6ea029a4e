"""Resume a run: what may differ from its start, from which checkpoint it continues, and how it is taken back to it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import write_text
from gemma_tune.errors import RunError
from gemma_tune.machine.world import ALONE, World
from gemma_tune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.checkpoints import go_back_to, has_checkpoints, last_complete_checkpoint, named_checkpoint, step_of
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import Lock, read_lock
from gemma_tune.runs.manifest import read_manifest, update_manifest
from gemma_tune.runs.metrics_log import keep_metrics_until
from gemma_tune.runs.reporter import Reporter
from gemma_tune.text import utc_now

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
_REQUIRED_PARTS = ("base", "adapter", "data", "engine.name", "method", "seed", "processes")
_IGNORED_PARTS = (
    "recipe", "overrides", "base.name", "base.directory", "adapter.name", "data.label", "engine.reason",
    "precision.reason",
)  # fmt: skip


@dataclass(frozen=True)
class Differences:
    """What differs between the start of a run and its resumption, a sentence each."""

    allowed: list[str]
    refused: list[str]


@dataclass(frozen=True)
class Resumption:
    """Where a run continues: its checkpoint, None for the first step; and the settings that differ, a sentence each."""

    checkpoint: Path | None
    changed: list[str]

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint is not None else 0


def resume_command(loaded: LoadedRecipe, run: RunDir, *, world: World = ALONE) -> str:
    """Return the shortest command line that continues a run: what the recipe says already is left out."""
    overrides = list({override.partition("=")[0]: override for override in loaded.overrides}.values())
    section = loaded.recipe.run
    if section.name != run.name:
        overrides = [each for each in overrides if not each.startswith("run.name=")] + [f"run.name={run.name}"]
    processes = ["--nproc", str(world.size)] if world.size > 1 else []
    return shlex.join(["gemma-tune", "train", loaded.given, *overrides, *processes, "--resume"])


def plan_resumption(run: RunDir, recipe: Recipe, *, from_step: int | None, reporter: Reporter) -> Resumption:
    """Find the checkpoint to resume from: that of a step, else the newest complete one.

    Raises:
        RunError: the recipe trains something else than the run did, or there is no such checkpoint.
    """
    differences = recipe_differences(load_recipe(run.resolved_recipe).recipe, recipe)
    _refuse(run, differences.refused)
    if from_step is not None:
        return Resumption(named_checkpoint(run, from_step), differences.allowed)
    if not has_checkpoints(run):
        reporter.warn(f"{run.path} ended before its first checkpoint: it starts again from step 0")
        return Resumption(None, differences.allowed)
    checkpoint, skipped = last_complete_checkpoint(run)
    for line in skipped:
        reporter.warn(line)
    return Resumption(checkpoint, differences.allowed)


def rewind_run(context: RunContext, recipe: Recipe, *, lock: Lock, resumption: Resumption) -> None:
    """Report what differs from the start of a run, and take its files back to the step that it resumes from.

    Raises:
        RunError: the run began with another base, other rows or another engine, or its lock is gone or damaged.
    """
    run, reporter = context.run, context.reporter
    differences = Differences([], [])
    if resumption.checkpoint is not None or run.lock.is_file():
        differences = lock_differences(read_lock(run), asdict(lock))
    _refuse(run, differences.refused)
    for line in resumption.changed:
        reporter.detail(f"changed: {line}")
    for line in differences.allowed:
        reporter.warn(f"changed: {line}; the run will not equal one without a break bit for bit")
    for name in go_back_to(run, resumption.checkpoint):
        reporter.detail(f"{name} is set aside")
    if resumption.checkpoint is not None:
        reporter.detail(f"resuming from {resumption.checkpoint.name}")
    keep_metrics_until(run, resumption.step)
    write_text(run.resolved_recipe, dump_recipe(recipe))
    now = {"at": utc_now(), "step": resumption.step, "changed": [*resumption.changed, *differences.allowed]}
    update_manifest(run, status="running", step=resumption.step, error=None, resumes=[*read_manifest(run).resumes, now])


def _refuse(run: RunDir, differences: Sequence[str]) -> None:
    """Anything that would mix two runs (F36)."""
    if differences:
        raise RunError(
            f"{run.path} was begun with something else:\n" + "\n".join(f"  {line}" for line in differences),
            hint="undo these changes, or start a new run without --resume",
        )


def recipe_differences(before: Recipe, now: Recipe) -> Differences:
    """Compare the settings of a run with those it is to be resumed with (F36)."""
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
