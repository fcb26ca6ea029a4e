"""Open the run that a training writes: find the one to resume or create a new one, hold it, and record how it ended."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma_tune.disk import is_next_content, reason_of, require_free_disk, to_json
from gemma_tune.errors import RunError, TrainingInterrupted
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.machine.world import World, explain_lost_processes
from gemma_tune.recipe.load import LoadedRecipe, load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.checkpoints import has_checkpoints
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.index import find_begun, hold_run, interrupted_run, numbered_runs
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import Status, read_manifest, update_manifest
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import Reporter
from gemma_tune.runs.resume import recipe_differences, resume_command

# Names that Windows reserves for devices, whatever their extension (S4).
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
# Room for the small files of a run: metrics, logs, answers, plot.
_SMALL_FILES_BYTES = 2_000_000


@dataclass(frozen=True)
class FoundRun:
    """The run of a recipe: `new`, `begun` and to be resumed, or `finished` with nothing left to train."""

    run: RunDir
    state: Literal["new", "begun", "finished"]


def find_or_create_run(loaded: LoadedRecipe, *, asked: bool, reporter: Reporter) -> FoundRun:
    """Return the run that a recipe resumes, or a new one. An interrupted run that is left alone is reported.

    Args:
        asked: resume in any case, as `--resume` does.

    Raises:
        RunError: there is nothing to resume, or the name is taken.
    """
    section = loaded.recipe.run
    begun = _run_to_resume(loaded, asked=asked, reporter=reporter)
    if begun is not None:
        return FoundRun(begun, "new" if not asked and _made_no_step(begun) else "begun")
    if not asked and section.resume == "auto" and section.name is not None:
        named = RunDir(Path(section.output_dir) / section.name)
        if _has_finished(named, loaded.recipe):
            return FoundRun(named, "finished")
    output_dir = Path(section.output_dir)
    made = create_run(output_dir, name=section.name, recipe_name=loaded.name, needed_bytes=_SMALL_FILES_BYTES)
    return FoundRun(made, "new")


def _has_finished(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run has trained all that a recipe asks for; a job that is started again finds it so."""
    if not (run.manifest.is_file() and run.resolved_recipe.is_file()) or read_manifest(run).status != "finished":
        return False
    differences = recipe_differences(load_recipe(run.resolved_recipe).recipe, recipe)
    return not differences.refused and not any(line.startswith("training.") for line in differences.allowed)


def _run_to_resume(loaded: LoadedRecipe, *, asked: bool, reporter: Reporter) -> RunDir | None:
    section = loaded.recipe.run
    output_dir = Path(section.output_dir)
    if asked:
        return find_begun(output_dir, name=section.name, recipe_name=loaded.name)
    run = interrupted_run(output_dir, name=section.name, recipe_name=loaded.name)
    if run is None:
        return None
    if _made_no_step(run):
        if section.name is None and section.resume != "auto":
            return None
        reporter.warn(f"{run.path} ended before its first checkpoint: it starts again from step 0")
        return run
    if section.resume == "auto":
        return run
    manifest = read_manifest(run)
    told = f"{run.path} was interrupted" + (
        f"; its newest checkpoint is of step {manifest.step} of {manifest.total_steps}" if manifest.step else ""
    )
    how = f"resume it with: {resume_command(loaded, run)}"
    if section.name is not None:
        raise RunError(told, hint=f"{how}; or choose another run.name")
    if has_checkpoints(run):
        reporter.warn(f"{told}, and this is a new run; {how}")
    return None


def _made_no_step(run: RunDir) -> bool:
    return not (run.checkpoints.is_dir() and any(run.checkpoints.iterdir())) and not read_metrics(run)


@contextlib.contextmanager
def working_in(found: FoundRun, *, reporter: Reporter, world: World) -> Iterator[RunContext]:
    """Hold the run for process 0, and give every other process a folder of its own, which goes when it is done.

    So all processes run the same code, only one of them writes the run, and machines need no disk in common.
    """
    run = found.run
    with contextlib.ExitStack() as stack:
        if world.is_main:
            stack.enter_context(hold_run(run))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            run = RunDir(Path(folder) / run.name)
            run.path.mkdir()
        stack.enter_context(libraries_to(run.library_log))
        yield RunContext(run, reporter, world)


@contextlib.contextmanager
def discarding_when_refused(run: RunDir) -> Iterator[None]:
    """Remove a run that never trained when the block raises; record the error in one that had begun to write again."""
    before = run.manifest.stat().st_mtime_ns if run.manifest.is_file() else None
    try:
        yield
    except BaseException as error:
        if not discard_run(run) and run.manifest.is_file() and run.manifest.stat().st_mtime_ns != before:
            _mark(run, "failed", f"{type(error).__name__}: {error}")
        raise
    run.made.unlink(missing_ok=True)


@contextlib.contextmanager
def recording_the_end(context: RunContext, loaded: LoadedRecipe) -> Iterator[None]:
    """Record in the manifest how a training ended, and say how an interrupted one is resumed."""
    run = context.run
    try:
        with explain_lost_processes():
            yield
    except TrainingInterrupted as error:
        _mark(run, "stopped", error.message)
        command = resume_command(loaded, run, world=context.world)
        raise TrainingInterrupted(error.message, hint=f"resume it with: {command}") from None
    except KeyboardInterrupt:
        _mark(run, "stopped", "interrupted")
        raise
    except BaseException as error:
        _mark(run, "failed", f"{type(error).__name__}: {error}")
        raise
    update_manifest(run, status="finished", error=None)


def _mark(run: RunDir, status: Status, error: str) -> None:
    """Record how a run ended; a full disk must not hide why."""
    with contextlib.suppress(RunError):
        update_manifest(run, status=status, error=error)


def create_run(output_dir: Path, *, name: str | None, recipe_name: str, needed_bytes: int) -> RunDir:
    """Make a fresh run directory; an existing one is never touched.

    Without a name the run is called after the recipe with the next free number: `quickstart-001`.

    Raises:
        RunError: the name is taken or reserved, the folder cannot be written, or fewer than `needed_bytes` are free.
    """
    if name is not None and name.split(".")[0].lower() in _DEVICE_NAMES:
        raise RunError(f"run.name={name} is the name of a device on Windows", hint="choose another name")
    try:
        if name is not None and os.path.lexists(output_dir / name):
            return _take_existing(RunDir(output_dir / name))
        made = _make_parents(output_dir)
        try:
            require_free_disk(
                output_dir, needed_bytes, what="the run", error=RunError, spare_bytes=0,
                hint="free some space, or set run.output_dir to another disk",
            )  # fmt: skip
            path = _make_numbered(output_dir, recipe_name) if name is None else output_dir / name
            if name is not None:
                path.mkdir()
            made.append(path)
            _record_made(RunDir(path), len(made))
            return RunDir(path)
        except (RunError, OSError):
            for folder in reversed(made):  # leave nothing behind that was not there
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        raise RunError(
            f"cannot write to {output_dir}: {reason_of(error)}", hint="set run.output_dir to a folder you may write to"
        ) from None


def _take_existing(run: RunDir) -> RunDir:
    """Return an empty folder, or a run that a kill ended before its first step, as a new run; refuse anything else."""
    entries = {entry.name for entry in run.path.iterdir()} if run.path.is_dir() else None
    if entries == set():
        _record_made(run, 0)
        return run
    if entries and run.made.name in entries and all(_is_first(run, entry) for entry in entries):
        return run
    if run.manifest.is_file():
        raise RunError(
            f"the run {run.path} exists already, and a run is never overwritten",
            hint="choose another run.name, leave it out for a numbered one, or continue it with --resume",
        )
    raise RunError(
        f"{run.path} exists already and is not a run: nothing is written into it",
        hint="choose another run.name, or leave it out for a numbered run",
    )


def _record_made(run: RunDir, num_folders: int) -> None:
    """Write how many folders were made for a run, itself first, before anything else of it.

    Raises:
        FileExistsError: another process did.
    """
    with run.made.open("x", encoding="utf-8") as file:
        try:
            file.write(to_json(num_folders))
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            run.made.unlink()
            raise


def _is_first(run: RunDir, name: str) -> bool:
    """Whether a name is that of a file that a run writes before its first step."""
    files = (run.recipe, run.resolved_recipe, run.template, run.manifest, run.data_report, run.plan, run.lock)
    return is_next_content(name, {run.made.name, run.library_log.name, *(file.name for file in files)})


def discard_run(run: RunDir) -> bool:
    """Remove what was made for a run that never trained: its files, and its folders where nothing else is in them.

    Returns:
        False where there is no record of what was made: nothing is removed.
    """
    if not run.made.is_file():
        return False
    num_folders = 0
    with contextlib.suppress(ValueError, TypeError):  # a record that a kill cut short names no folder
        num_folders = int(json.loads(run.made.read_text(encoding="utf-8")))
    names = [entry.name for entry in run.path.iterdir() if _is_first(run, entry.name)]
    for name in sorted(names, key=run.made.name.__eq__):  # the record goes last
        (run.path / name).unlink()
    with contextlib.suppress(OSError):  # not empty
        for folder in (run.path.absolute(), *run.path.absolute().parents)[:num_folders]:
            folder.rmdir()
    return True


def _make_parents(folder: Path) -> list[Path]:
    """Create the missing folders down to `folder` and return them, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    made: list[Path] = []
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        made.append(parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return made


def _make_numbered(output_dir: Path, recipe_name: str) -> Path:
    """`mkdir` is the lock: two runs that start together get two numbers."""
    number = max(numbered_runs(output_dir, recipe_name), default=0) + 1
    while True:
        path = output_dir / f"{recipe_name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
