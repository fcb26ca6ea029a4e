"""The state of a run, in manifest.json. The file is replaced atomically, so that a reader never sees half of it."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from gemma_tune.disk import read_json_object, write_json
from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir
from gemma_tune.text import utc_now

Status = Literal["running", "finished", "stopped", "failed"]
_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "status": (str,), "started": (str,), "updated": (str,), "step": (int,), "total_steps": (int, _NONE),
    "packed": (bool, _NONE), "error": (str, _NONE), "resumes": (list,),
}  # fmt: skip
_REQUIRED = ("status", "started", "updated")
_DAMAGED_HINT = "put it back from a copy, or start a new run; the adapter and the checkpoints are not touched"


@dataclass(frozen=True)
class Manifest:
    """The state of a run. Times are UTC, ISO 8601; `step` is that of the newest checkpoint."""

    status: Status
    started: str
    updated: str
    step: int = 0
    total_steps: int | None = None
    packed: bool | None = None  # whether rows were joined, once training has begun
    error: str | None = None
    # each time that the run went on: when, from which step, and what differed from before
    resumes: list[dict[str, Any]] = field(default_factory=list)


def start_manifest(run: RunDir) -> Manifest:
    now = utc_now()
    manifest = Manifest(status="running", started=now, updated=now)
    write_json(run.manifest, asdict(manifest))
    return manifest


def read_manifest(run: RunDir) -> Manifest:
    """Read the state of a run; fields of another version are left out.

    Raises:
        RunError: the file is damaged.
    """
    return _checked(run, _read(run))


def update_manifest(run: RunDir, **changes: Any) -> Manifest:
    """Change fields of the manifest on disk, and keep all others."""
    values = {**_read(run), **changes, "updated": utc_now()}
    manifest = _checked(run, values)
    write_json(run.manifest, {**values, **asdict(manifest)})
    return manifest


def _read(run: RunDir) -> dict[str, Any]:
    return read_json_object(run.manifest, hint=_DAMAGED_HINT)


def _checked(run: RunDir, values: dict[str, Any]) -> Manifest:
    known = {each.name: values[each.name] for each in fields(Manifest) if each.name in values}
    for name, value in ((name, known.get(name)) for name in _TYPES if name in known or name in _REQUIRED):
        allowed = _TYPES[name]
        if not isinstance(value, allowed) or (name == "status" and value not in get_args(Status)):
            raise RunError(f"{run.manifest} is damaged: {name} is {value!r}", hint=_DAMAGED_HINT)
    return Manifest(**known)
