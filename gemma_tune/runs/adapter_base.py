"""Where a base meets an adapter: the base is found wherever it lies now, and compared with the one of the training.

Every command that loads both comes through here. What an adapter was trained on is recorded as SHA-256 of files: in the
run's lock.json, in an export's export.json, and next to the adapter itself (base.json), so that a copy still knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object, write_json
from gemma_tune.errors import GemmaTuneError, ModelError, RunError
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.models.resolve import resolve
from gemma_tune.models.safetensors import CONFIG_FILE, file_hashes, read_config, stored_tensors
from gemma_tune.runs.adapter_dir import AdapterDir
from gemma_tune.runs.adapter_fit import require_fit
from gemma_tune.runs.layout import RunDir
from gemma_tune.text import listed

BASE_FILE = "base.json"
_EXPORT_FILE = "export.json"
_HINT = (
    "with another base the adapter means something else: put back what was trained on; merge, export and verify take "
    "an equal copy with --base DIR"
)
# How far above an adapter its run is: RUN/adapter, RUN/checkpoints/checkpoint-N, RUN/export/adapter.
_LEVELS = 3


@dataclass(frozen=True)
class TrainedOn:
    """The base of a training, as it is recorded."""

    name: str | None = None  # name, revision: as the recipe named it; None where nobody says
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by file name; empty where they were not recorded
    directory: str | None = None  # where it lay, of a base that is not on the hub
    quantized: bool = False  # its weights were stored in few bits


@dataclass(frozen=True)
class JoinedBase:
    """A base that belongs to an adapter."""

    model: LocalModel
    files: Mapping[str, str]  # SHA-256 of its files
    note: str | None  # what could not be compared, in a sentence; None where its files are those of the training


def base_record(base: LocalModel) -> dict[str, Any]:
    """Return what is kept of a base next to what was trained on it."""
    return {
        "name": base.name,
        "revision": base.revision,
        "files": file_hashes(base.directory),
        "directory": None if base.revision or base.model else str(base.directory.absolute()),
        "quantized": base.config.quantization is not None,
    }


def write_base_record(adapter: Path, base: LocalModel) -> None:
    """Record the base next to an adapter, whose config names it."""
    write_json(adapter / BASE_FILE, {"base": base_record(base) | {"name": None, "directory": None}})


def read_trained_on(adapter: AdapterDir) -> TrainedOn:
    """Return what is recorded of an adapter's base: by the run above it, by itself, else what its config says."""
    run = next((RunDir(above) for above in adapter.path.absolute().parents[:_LEVELS] if _is_run(above)), None)
    files = [*([run.lock] if run is not None else []), adapter.path / BASE_FILE, adapter.path / _EXPORT_FILE]
    records = [read_json_object(path, error=adapter.error).get("base") for path in files if path.is_file()]
    known = [record for record in records if isinstance(record, dict)]
    first: dict[str, Any] = known[0] if known else {}
    hashes: dict[str, str] = known[-1].get("files") or {} if known else {}  # the nearest to the adapter
    config = adapter.config if adapter.exists else {}
    return TrainedOn(
        name=(first.get("name") if run is not None else None) or config.get("base_model_name_or_path"),
        revision=first.get("revision") or config.get("revision"),
        files=hashes,
        directory=first.get("directory"),
        quantized=bool(first.get("quantized")),
    )


def _is_run(folder: Path) -> bool:
    return RunDir(folder).manifest.is_file()


def find_base(
    adapter: AdapterDir, *, named: str | None = None, with_adapter: bool = True, hint: str = "name it with --base"
) -> JoinedBase:
    """Find the base of an adapter, compare it with what was trained on, and check the adapter against it.

    A relative path counts from here, from the folders above the adapter, and from where the training was; the first
    place with equal files is taken.

    Args:
        named: the base as the user gave it; it is compared as well.
        with_adapter: whether the adapter is used; its base alone can be asked when it is damaged.
        hint: what to do where no base is named.

    Raises:
        GemmaTuneError: there is no such base, it has other files, or the adapter is damaged or does not fit it.
    """
    trained_on = read_trained_on(adapter)
    if named is None and not trained_on.name:
        adapter.require_base_name(hint=hint)
    refused: GemmaTuneError | None = None
    for model in [fetch_model(named)] if named is not None else _candidates(adapter, trained_on):
        try:
            return _join(adapter, model, trained_on, with_adapter=with_adapter)
        except _OtherBase as cause:
            refused = refused or adapter.error(cause.message, hint=cause.hint)
    raise refused or adapter.error(
        f"the base {trained_on.name} of {adapter.path} is not here, in no folder above it, and not at "
        f"{trained_on.directory}",
        hint=_HINT,
    )


def require_base(adapter: AdapterDir, model: LocalModel) -> str | None:
    """Compare a base that is decided on with the one that an adapter was trained on, and check that the two fit.

    Returns:
        What could not be compared, in a sentence.

    Raises:
        GemmaTuneError: as `find_base`.
    """
    return _join(adapter, model, read_trained_on(adapter), with_adapter=True).note


class _OtherBase(RunError):
    """The base has other files than the one of the training."""


def _candidates(adapter: AdapterDir, trained_on: TrainedOn) -> Iterator[LocalModel]:
    """What a recorded name may stand for, the likeliest first."""
    name = trained_on.name or ""
    if _is_known(name):
        yield fetch_model(name, revision=trained_on.revision)
        return
    places = [folder / name for folder in (Path(), *adapter.path.absolute().parents)]
    places += [Path(trained_on.directory)] if trained_on.directory else []
    found = [place for place in places if (place / CONFIG_FILE).is_file()]
    for place in dict.fromkeys(found):
        yield replace(fetch_model(str(place)), name=name)
    if trained_on.directory is None and (trained_on.revision is not None or not found):
        yield fetch_model(name, revision=trained_on.revision)


def _is_known(name: str) -> bool:
    """Whether a name is of the catalogue or of Kaggle, and no path."""
    try:
        return resolve(name).kind in ("catalogue", "kaggle")
    except ModelError:
        return False


def _join(adapter: AdapterDir, model: LocalModel, trained_on: TrainedOn, *, with_adapter: bool) -> JoinedBase:
    files, note = file_hashes(model.directory), None
    if not trained_on.files:
        note = f"{adapter.path}: nobody recorded the weights that it was trained on"
    elif trained_on.quantized and model.config.quantization is None:
        note = f"{adapter.path} was trained on {trained_on.name} in fewer bits"
    else:
        differ = [name for name, digest in trained_on.files.items() if files.get(name) != digest]
        if differ:
            told = listed([name if name in files else f"{name} (missing)" for name in differ], shown=4)
            raise _OtherBase(
                f"{model.directory} is not the base that {adapter.path} was trained on, {trained_on.name}: "
                f"these files differ: {told}",
                hint=_HINT,
            )
    lora = adapter.require_sound() if with_adapter else None
    if lora is not None:
        try:
            require_fit(lora, stored_tensors(model.directory), base_config=read_config(model.directory))
        except GemmaTuneError as cause:
            raise adapter.error(cause.message, hint=cause.hint) from None
    return JoinedBase(model, files, f"{note}: of {model.name} the shapes alone are compared" if note else None)
