"""What a run writes about itself: manifest, lock and metrics, in JSON.

Files are replaced atomically, so that a reader never sees half of one.
"""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir
from gemma_tune.secrets import mask_secrets

Status = Literal["running", "finished", "stopped", "failed"]

# The packages whose versions decide what a run computes.
RECORDED_PACKAGES = (
    "gemma-tune", "torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth", "unsloth_zoo",
    "accelerate", "datasets", "tokenizers", "safetensors", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The state of a run. Times are UTC, ISO 8601; `step` is that of the newest checkpoint.

    Attributes:
        packed: whether rows were joined, once training has begun.
        resumes: each time that the run went on: when, from which step, and what differed from before.
    """

    status: Status
    started: str
    updated: str
    step: int = 0
    total_steps: int | None = None
    packed: bool | None = None
    error: str | None = None
    resumes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Lock:
    """Everything a run depends on. Hashes are SHA-256 in hex.

    Attributes:
        base: name, revision (hub commit, or null), directory-independent file hashes of the base model.
        processes: how many trained together.
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
    adapter: dict[str, str] | None = None
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    packages: dict[str, str | None] = field(
        default_factory=lambda: {name: installed_version(name) for name in RECORDED_PACKAGES}
    )


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 beside the target, credentials masked, flush to disk, and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(mask_secrets(text))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int) -> bool:
    """Whether the open file or directory is ours alone now; the system drops the lock when it is closed.

    Where there are no locks (Windows, a mounted Drive or bucket) the answer is yes.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error of a file that could not be written, with the free space where that is short."""
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    return RunError(
        f"cannot write {path}: {(error.strerror or str(error)).lower()}"
        + (f"; {free / 1e6:,.1f} MB are free there" if error.errno == errno.ENOSPC else ""),
        hint="make space, and go on with --resume" if error.errno == errno.ENOSPC else None,
    )


def write_json(path: Path, value: object) -> None:
    write_text(path, to_json(value))


def to_json(value: object) -> str:
    """The one form in which JSON files of a run are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; a missing or broken one is a `RunError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.parent} has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None


def start_manifest(run: RunDir) -> Manifest:
    now = utc_now()
    manifest = Manifest(status="running", started=now, updated=now)
    write_json(run.manifest, asdict(manifest))
    return manifest


def read_manifest(run: RunDir) -> Manifest:
    return Manifest(**read_json(run.manifest))


def update_manifest(run: RunDir, **changes: Any) -> Manifest:
    """Change fields of the manifest on disk."""
    manifest = Manifest(**{**asdict(read_manifest(run)), **changes, "updated": utc_now()})
    write_json(run.manifest, asdict(manifest))
    return manifest


def append_metrics(run: RunDir, values: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl; non-finite numbers are written as null, as JSON has none."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    line = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    try:
        with run.metrics.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(mask_secrets(line) + "\n")
    except OSError as error:
        raise cannot_write(run.metrics, error) from None


def flush_metrics(run: RunDir) -> None:
    """Have every line on the disk, so that a checkpoint never knows a step that metrics.jsonl has lost."""
    if run.metrics.is_file():
        with run.metrics.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())


def keep_metrics_until(run: RunDir, step: int) -> None:
    """Leave out the lines after a step, and one that a crash has cut, before a run goes on from that step."""
    if run.metrics.is_file():
        rows = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(run.metrics, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl; a last line cut by a crash is left out."""
    if not run.metrics.is_file():
        return []
    rows = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
