"""The runs of a folder: which is the newest of a recipe, and the state that one is in."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gemma_tune.disk import locked
from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir, open_run
from gemma_tune.runs.manifest import Manifest, read_manifest

# `dead`: the manifest says running, but no process holds the run.
RunState = Literal["running", "finished", "stopped", "failed", "dead"]


def state_of(run: RunDir) -> RunState:
    """Return the state of a run that has a manifest."""
    if is_held(run):
        return "running"
    status = read_manifest(run).status
    return "dead" if status == "running" else status


def describe_state(run: RunDir) -> Manifest:
    """Return the manifest as it is shown: a run whose process is gone was stopped."""
    manifest, state = read_manifest(run), state_of(run)
    if state == "dead":
        return replace(manifest, status="stopped", error="its process is gone")
    return replace(manifest, status=state)


@contextlib.contextmanager
def hold_run(run: RunDir) -> Iterator[None]:
    """Keep other processes from training in the same run; the hold ends with the process, however it ends.

    Raises:
        RunError: another process holds it.
    """
    with locked(run.path, patience_seconds=0.5) as is_ours:
        if not is_ours:
            raise RunError(
                f"{run.path} is being trained by another process", hint="wait for it, or choose another run.name"
            )
        yield


def is_held(run: RunDir) -> bool:
    """Whether some process trains in the run now."""
    with locked(run.path, shared=True) as is_free:  # shared: two who look at once do not see each other
        return not is_free


def find_begun(output_dir: Path, *, name: str | None, recipe_name: str) -> RunDir:
    """Return the run that `--resume` continues, finished or not: the named one, else the newest run of that recipe.

    Raises:
        RunError: there is none.
    """
    if name is not None:
        return open_run(output_dir / name)
    run = newest_run(output_dir, recipe_name)
    if run is None:
        raise RunError(
            f"nothing to resume: {output_dir} holds no run of the recipe {recipe_name!r}",
            hint="start it without --resume",
        )
    return run


def interrupted_run(output_dir: Path, *, name: str | None, recipe_name: str) -> RunDir | None:
    """Return the named run, else the newest of the recipe, when it was begun, has not finished and is not running."""
    run = RunDir(output_dir / name) if name is not None else newest_run(output_dir, recipe_name)
    if run is None or not (run.manifest.is_file() and run.resolved_recipe.is_file()):
        return None
    return run if state_of(run) in ("stopped", "failed", "dead") else None


def newest_run(output_dir: Path, recipe_name: str) -> RunDir | None:
    """Return the numbered run of a recipe that was begun last, or None."""
    numbered = numbered_runs(output_dir, recipe_name)
    runs = [number for number, path in numbered.items() if RunDir(path).manifest.is_file()]
    return RunDir(numbered[max(runs)]) if runs else None


def numbered_runs(output_dir: Path, recipe_name: str) -> dict[int, Path]:
    """Return the directories `<recipe_name>-<number>` by their number."""
    found = {}
    for path in output_dir.glob("*"):
        start, _, number = path.name.rpartition("-")
        if start == recipe_name and len(number) >= 3 and number.isdecimal():
            found[int(number)] = path
    return found
