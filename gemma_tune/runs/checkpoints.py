"""Checkpoints on disk: written whole or not at all, proven before an older one goes, found again by themselves.

A checkpoint is written into a hidden folder next to its place, flushed, sealed with every file's size and hash, and
renamed. What is listed therefore is complete, and the seal tells so even where a rename is not atomic, as on a mounted
Drive. Nothing of it is a pickle.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gemma_tune.disk import free_bytes, read_json, replaced_directory, require_free_disk, sync_tree, to_json, write_json
from gemma_tune.errors import RunError
from gemma_tune.identity import file_sha256
from gemma_tune.runs.layout import RunDir
from gemma_tune.text import format_bytes

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.checkpoint-\d+\.(partial|removed)")  # a save or a removal that a crash cut short
_NOTHING_LOST = "make space, and resume with --resume: the earlier checkpoints are whole"
_SMALL_FILES_BYTES = 1_000_000  # of a checkpoint: configuration, scheduler, seal


def checkpoint_path(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that were done when it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def write_checkpoint(run: RunDir, *, step: int, tensor_bytes: int, write: Callable[[Path], None]) -> Path:
    """Save a checkpoint whole, or raise and leave the earlier ones as they were.

    Args:
        tensor_bytes: what `write` will put into its folder, in bytes; the free space is checked against it.
        write: puts the files into the folder it is given.

    Raises:
        RunError: there is too little space, or the files cannot be written.
    """
    final = checkpoint_path(run, step)
    needed = tensor_bytes + _SMALL_FILES_BYTES
    require_free(final, needed, what="it")

    def explain(cause: Exception) -> Exception:
        if not isinstance(cause, OSError | SafetensorError | RunError):
            return cause
        return RunError(
            f"{final.name} could not be saved: {getattr(cause, 'strerror', None) or cause}; it needs "
            f"{format_bytes(needed, digits=2)}, {format_bytes(free_bytes(final), digits=2)} were free in {run.path}",
            hint=_NOTHING_LOST,
        )

    with replaced_directory(final, explain=explain, displace=set_aside) as partial:
        write(partial)
        seal_checkpoint(partial)
    fault = _fault_at_a_glance(final)
    if fault is not None:
        raise RunError(f"{final.name} could not be saved: {fault}", hint=_NOTHING_LOST)
    return final


def require_free(path: Path, needed_bytes: int, *, what: str) -> None:
    """Raise a `RunError` with both figures when the disk of `path` has fewer bytes free."""
    require_free_disk(path, needed_bytes, what=what, error=RunError, hint=_NOTHING_LOST, spare_bytes=0)


def seal_checkpoint(path: Path) -> None:
    """Flush every file of a finished checkpoint to disk and record its name, size in bytes and SHA-256."""
    sync_tree(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != SEAL)
    write_json(path / SEAL, {"files": {file.relative_to(path).as_posix(): _facts(file) for file in files}})


def remove_old_checkpoints(run: RunDir, *, keep: int, protected: Iterable[Path]) -> None:
    """Remove all but the newest `keep` complete checkpoints; `protected` ones stay in any case (F38)."""
    complete = [path for path in _listed(run) if _fault_at_a_glance(path) is None]
    safe = set(protected)
    for path in complete[keep:]:
        if path in safe:
            continue
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):  # one too many is no reason to lose a run
            path.rename(hidden)  # at once, so that a crash leaves no half checkpoint in the list
        shutil.rmtree(hidden, ignore_errors=True)


def last_complete_checkpoint(run: RunDir) -> tuple[Path, list[str]]:
    """The newest checkpoint that is complete, by size and hash of every file.

    Returns:
        Its directory, and a sentence for each newer one that was passed over (F33).

    Raises:
        RunError: the run has no complete checkpoint.
    """
    skipped: list[str] = []
    for path in _listed(run):
        fault = fault_of(path)
        if fault is None:
            return path, skipped
        skipped.append(f"{path.name} is passed over: {fault}")
    raise RunError(
        f"{run.path} has no complete checkpoint" + "".join(f"\n  {line}" for line in skipped),
        hint="start a new run; training.save_every_steps sets how often a checkpoint is written",
    )


def named_checkpoint(run: RunDir, step: int) -> Path:
    """The checkpoint of a step.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = checkpoint_path(run, step)
    fault = fault_of(path) if path.is_dir() else "there is no such checkpoint"
    if fault is not None:
        steps = sorted(step_of(found) for found in _listed(run) if fault_of(found) is None)
        raise RunError(f"{path}: {fault}", hint="complete ones: " + (", ".join(map(str, steps)) or "none"))
    return path


def has_checkpoints(run: RunDir) -> bool:
    """Whether a run lists any checkpoint that was finished, whole or damaged since."""
    return any((path / SEAL).exists() for path in _listed(run))


def go_back_to(run: RunDir, checkpoint: Path | None) -> list[str]:
    """Prepare the folder for a run that resumes from a checkpoint, or from its first step where it is None.

    What a crash left half written is swept; newer checkpoints, damaged or of the line that is left, are set aside.

    Returns:
        The names of those set aside.
    """
    if not run.checkpoints.is_dir():
        return []
    for path in run.checkpoints.iterdir():
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    step = step_of(checkpoint) if checkpoint is not None else -1
    newer = [path for path in _listed(run) if step_of(path) > step]
    for path in newer:
        set_aside(path)
    return [path.name for path in newer]


def set_aside(path: Path) -> None:
    """Move a checkpoint out of the list, into `set-aside/` next to it, under a name that is free there."""
    folder = path.parent / "set-aside"
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while target.exists():
        number += 1
        target = folder / f"{path.name}.{number}"
    path.rename(target)


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the hash of every file, or None."""
    fault = _fault_at_a_glance(path)
    if fault is not None:
        return fault
    wrong = [name for name, facts in read_json(path / SEAL)["files"].items() if _facts(path / name) != facts]
    return f"{wrong[0]} is not what was written" if wrong else None


def _fault_at_a_glance(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the names and sizes of its files, or None."""
    if not (path / SEAL).is_file():
        return "it was not finished"
    try:
        seal = read_json(path / SEAL)
        sizes = {str(name): int(facts["bytes"]) for name, facts in seal["files"].items()}
    except (RunError, KeyError, TypeError, ValueError, AttributeError):
        return "its seal is damaged"
    if (path / SEAL).read_text(encoding="utf-8") != to_json(seal):
        return "its seal is damaged"  # by a flipped bit that is still JSON
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def _listed(run: RunDir) -> list[Path]:
    """The directories with a checkpoint's name, newest first."""
    return sorted(
        (path for path in run.checkpoints.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True
    )


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
