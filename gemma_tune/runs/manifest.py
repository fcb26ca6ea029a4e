"""The state of a run, in manifest.json. The file is replaced atomically, so that a reader never sees half of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gemma_tune.disk import read_json, write_json
from gemma_tune.runs.layout import RunDir
from gemma_tune.text import utc_now

Status = Literal["running", "finished", "stopped", "failed"]


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
