"""Where a base meets an adapter: the base is found wherever it lies now, and compared with the one of the training.

Every command that loads both comes through here. What an adapter was trained on is recorded as SHA-256 of files: in the
run's lock.json, in an export's export.json, and next to the adapter itself (base.json), so that a copy still knows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object, write_json
from gemma_tune.errors import GemmaTuneError, ModelError
from gemma_tune.identity import files_sha256
from gemma_tune.models.directory import BASE_FILE, EXPORT_FILE, require_recorded
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.models.resolve import resolve
from gemma_tune.models.safetensors import (
    CHAT_TEMPLATE_FILES,
    CONFIG_FILE,
    TOKENIZER_FILES,
    file_hashes,
    read_config,
    stored_tensors,
)
from gemma_tune.runs.adapter_dir import ADAPTER_WEIGHTS_FILE, TEMPLATE_FILE, AdapterDir
from gemma_tune.runs.adapter_fit import require_fit
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import read_lock
from gemma_tune.text import listed

# What an answer depends on besides the config, of which a user may change the name of the base.
_RECORDED = (ADAPTER_WEIGHTS_FILE, TEMPLATE_FILE, *TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)
_HINT = (
    "with another base the adapter means something else: put back what was trained on; merge, export and verify take "
    "an equal copy with --base DIR"
)


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
    """Record next to an adapter, whose config names its base, what its base and its own files hold."""
    record = base_record(base) | {"name": None, "directory": None}
    own = files_sha256([adapter / name for name in _RECORDED if (adapter / name).is_file()])
    write_json(adapter / BASE_FILE, {"base": record, "sha256": own})


def read_trained_on(adapter: AdapterDir) -> TrainedOn:
    """Return what is recorded of an adapter's base: next to it, by its run, else what its config says.

    Raises:
        GemmaTuneError: a record is damaged. That of the run is not needed where one lies next to the adapter.
    """
    near = [
        _read_record(adapter, read_json_object(path, error=adapter.error).get("base"), path)
        for path in (adapter.path / BASE_FILE, adapter.path / EXPORT_FILE)
        if path.is_file()
    ]
    run, above = _run_of(adapter.path), None
    if run is not None and run.lock.is_file():
        try:
            above = _read_record(adapter, read_lock(run)["base"], run.lock)
        except GemmaTuneError:
            if not near:
                raise
    config = adapter.config if adapter.exists and above is None else {}
    own, above = near[0] if near else above, above or TrainedOn()
    own = own or above
    return TrainedOn(
        name=above.name or config.get("base_model_name_or_path"),
        revision=above.revision or own.revision or config.get("revision"),
        files=own.files,
        directory=above.directory,
        quantized=own.quantized,
    )


def _read_record(adapter: AdapterDir, record: Any, path: Path) -> TrainedOn:
    """What a file says of a base."""
    known = record if isinstance(record, dict) else {"files": None}
    texts, files = [known.get(name) for name in ("name", "revision", "directory")], known.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(each, str | None) for each in (*texts, *files.values())):
        raise adapter.error(
            f"{path} is damaged: it does not say what the base was", hint="put it back from a copy of the run"
        )
    name, revision, directory = texts
    return TrainedOn(name, revision, files, directory, quantized=bool(known.get("quantized")))


def _run_of(path: Path) -> RunDir | None:
    """The run that an adapter was trained or exported in."""
    for place in (path.absolute(), path.resolve()):
        for run in map(RunDir, place.parents):
            is_in = place == run.adapter or run.checkpoints in place.parents or run.exports in place.parents
            if is_in and run.manifest.is_file():
                return run
    return None


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
    for place in [named] if named is not None else _places(adapter, trained_on):
        try:
            model = fetch_model(place, revision=None if named is not None else trained_on.revision)
            model = model if named else replace(model, name=trained_on.name or place)
            return _join(adapter, model, trained_on, with_adapter=with_adapter)
        except GemmaTuneError as cause:  # an equal copy may lie elsewhere
            refused = refused or cause
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


def _places(adapter: AdapterDir, trained_on: TrainedOn) -> list[str]:
    """What a recorded name may stand for, the likeliest first."""
    name = trained_on.name or ""
    if _is_known(name):
        return [name]
    above = [folder for path in (adapter.path.absolute(), adapter.path.resolve()) for folder in path.parents]
    places = [folder / name for folder in (Path(), *above)] + [Path(trained_on.directory or name)]
    found = [str(place) for place in dict.fromkeys(places) if (place / CONFIG_FILE).is_file()]
    is_on_hub = trained_on.directory is None and (trained_on.revision is not None or not found)
    return [*found, *([name] if is_on_hub else [])]


def _is_known(name: str) -> bool:
    """Whether a name is of the catalogue or of Kaggle, and no path."""
    try:
        return resolve(name).kind in ("catalogue", "kaggle")
    except ModelError:
        return False


def _join(adapter: AdapterDir, model: LocalModel, trained_on: TrainedOn, *, with_adapter: bool) -> JoinedBase:
    if with_adapter:  # before the base is read, which takes a minute
        lora = adapter.require_sound()
        try:
            if lora is not None:
                require_fit(lora, stored_tensors(model.directory), base_config=read_config(model.directory))
        except GemmaTuneError as cause:
            raise adapter.error(cause.message, hint=cause.hint) from None
        require_recorded(adapter.path, only=_RECORDED, error=adapter.error)
    files, note = file_hashes(model.directory), None
    if not trained_on.files:
        note = f"{adapter.path}: nobody recorded the weights that it was trained on"
    elif trained_on.quantized and model.config.quantization is None:
        note = f"{adapter.path} was trained on {trained_on.name} in fewer bits"
    else:
        differ = [name for name, digest in trained_on.files.items() if files.get(name) != digest]
        if differ:
            told = listed([name if name in files else f"{name} (missing)" for name in differ], shown=4)
            raise adapter.error(
                f"{model.directory} is not the base that {adapter.path} was trained on, {trained_on.name}: "
                f"these files differ: {told}",
                hint=_HINT,
            )
    return JoinedBase(model, files, f"{note}: of {model.name} the shapes alone are compared" if note else None)
