"""The run directory: the name of every file of a run, and how a run is made, found and opened.

A run directory is the interface between the stages: every later command takes one and needs nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.disk import require_free_disk
from gemma_tune.errors import RunError

# Names that Windows reserves for devices, whatever their extension (S4).
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


@dataclass(frozen=True)
class RunDir:
    """The files of one run. Every property is a path below `path`; none has to exist yet."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The recipe file as it was given."""
        return self.path / "recipe.yaml"

    @property
    def resolved_recipe(self) -> Path:
        """The recipe with overrides applied and every default written out."""
        return self.path / "resolved.yaml"

    @property
    def template(self) -> Path:
        """The data template that was trained with."""
        return self.path / "template.yaml"

    @property
    def lock(self) -> Path:
        """What the run depends on: versions, hashes, hardware."""
        return self.path / "lock.json"

    @property
    def manifest(self) -> Path:
        """The state of the run: running, finished, stopped or failed."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def data_report(self) -> Path:
        return self.path / "data.json"

    @property
    def summary(self) -> Path:
        """What came out: losses, exact match, answers before and after, times."""
        return self.path / "summary.json"

    @property
    def answers(self) -> Path:
        """One JSON object an eval row: prompt, expected response, answer before, answer after."""
        return self.path / "answers.jsonl"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def library_log(self) -> Path:
        """Everything that the libraries printed or warned of."""
        return self.path / "library.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format, with the tokenizer and its chat template beside it."""
        return self.path / "adapter"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, where the recipe names it."""
        return self.path / "tensorboard"

    @property
    def exports(self) -> Path:
        """A directory a format that the adapter was exported in."""
        return self.path / "export"


def create_run(output_dir: Path, *, name: str | None, recipe_name: str, needed_bytes: int) -> RunDir:
    """Make a fresh run directory; an existing one is never touched.

    Without a name the run is called after the recipe with the next free number: `quickstart-001`.

    Raises:
        RunError: the name is taken or reserved, the folder cannot be written, or fewer than `needed_bytes` are free.
    """
    if name is not None and name.split(".")[0].lower() in _DEVICE_NAMES:
        raise RunError(f"run.name={name} is the name of a device on Windows", hint="choose another name")
    if name is not None and (output_dir / name).exists():
        if _was_never_begun(output_dir / name):
            return RunDir(output_dir / name)
        raise RunError(
            f"the run {output_dir / name} exists already, and a run is never overwritten",
            hint="choose another run.name, leave it out for a numbered one, or continue it with --resume",
        )
    try:
        made = _make_parents(output_dir)
        try:
            require_free_disk(
                output_dir, needed_bytes, what="the run", error=RunError, spare_bytes=0,
                hint="free some space, or set run.output_dir to another disk",
            )  # fmt: skip
            return RunDir(_make_named(output_dir, name) if name else _make_numbered(output_dir, recipe_name))
        except (RunError, OSError):
            for folder in reversed(made):  # leave nothing behind that was not there
                folder.rmdir()
            raise
    except OSError as error:
        raise RunError(
            f"cannot write to {output_dir}: {(error.strerror or str(error)).lower()}",
            hint="set run.output_dir to a folder you may write to",
        ) from None


def _was_never_begun(path: Path) -> bool:
    """Whether a run ended before it had a manifest: nothing but the first files of a run is there."""
    run = RunDir(path)
    first = {file.name for file in (run.recipe, run.resolved_recipe, run.template, run.library_log)}
    return path.is_dir() and all(entry.name in first or entry.name.endswith(".tmp") for entry in path.iterdir())


def discard_run(run: RunDir) -> None:
    """Remove a run that was refused before its first step, and its output folder when nothing else is in it."""
    shutil.rmtree(run.path)
    with contextlib.suppress(OSError):  # not empty
        run.path.parent.rmdir()


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


def _make_named(output_dir: Path, name: str) -> Path:
    path = output_dir / name
    path.mkdir()
    return path


def _make_numbered(output_dir: Path, recipe_name: str) -> Path:
    """`mkdir` is the lock: two runs that start together get two numbers."""
    number = max(_numbered_runs(output_dir, recipe_name), default=0) + 1
    while True:
        path = output_dir / f"{recipe_name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _numbered_runs(output_dir: Path, recipe_name: str) -> dict[int, Path]:
    """The directories `<recipe_name>-<number>` by their number."""
    found = {}
    for path in output_dir.glob("*"):
        start, _, number = path.name.rpartition("-")
        if start == recipe_name and len(number) >= 3 and number.isdecimal():
            found[int(number)] = path
    return found


def open_run(path: Path) -> RunDir:
    """Open the run directory at `path`.

    Raises:
        RunError: there is no run at that path.
    """
    run = RunDir(path)
    if not path.is_dir():
        near = (
            sorted(str(found.parent) for found in path.parent.glob("*/manifest.json"))[-3:]
            if path.parent.is_dir()
            else []
        )
        raise RunError(f"no such run: {path}", hint=f"runs there: {', '.join(near)}" if near else None)
    if not run.manifest.is_file():
        raise RunError(
            f"{path} is not a run directory: it has no {run.manifest.name}",
            hint="give a directory that `gemma-tune train` made",
        )
    return run


def find_interrupted(output_dir: Path, *, name: str | None, recipe_name: str) -> RunDir:
    """The run that `--resume` continues: the named one, else the newest run of that recipe.

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


def newest_run(output_dir: Path, recipe_name: str) -> RunDir | None:
    """The numbered run of a recipe that was begun last, or None."""
    numbered = _numbered_runs(output_dir, recipe_name)
    runs = [number for number, path in numbered.items() if RunDir(path).manifest.is_file()]
    return RunDir(numbered[max(runs)]) if runs else None
