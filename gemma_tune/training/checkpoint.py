"""Which checkpoints are complete: a seal with every file's size and hash, written last."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import read_json, write_json

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal_checkpoint(path: Path) -> None:
    """Record name, size in bytes and SHA-256 of every file of a finished checkpoint."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != SEAL)
    write_json(path / SEAL, {"files": {file.relative_to(path).as_posix(): _facts(file) for file in files}})


def last_complete_checkpoint(run: RunDir) -> tuple[Path, list[str]]:
    """The newest checkpoint that is complete.

    Returns:
        Its directory, and a sentence for each newer one that was passed over (F33).

    Raises:
        RunError: the run has no complete checkpoint.
    """
    found = sorted(
        (path for path in run.checkpoints.glob("checkpoint-*") if _NAME.fullmatch(path.name)),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    skipped: list[str] = []
    for path in found:
        fault = _fault(path)
        if fault is None:
            return path, skipped
        skipped.append(f"{path.name} is passed over: {fault}")
    raise RunError(
        f"{run.path} has no complete checkpoint" + "".join(f"\n  {line}" for line in skipped),
        hint="start a new run; training.save_every_steps sets how often a checkpoint is written",
    )


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / SEAL).is_file():
        return "it was not finished"
    try:
        files: dict[str, dict[str, Any]] = read_json(path / SEAL)["files"]
    except (RunError, KeyError):
        return "its seal is damaged"
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} of {facts['bytes']} bytes"
        if _facts(file) != facts:
            return f"{name} is not what was written"
    return None


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
