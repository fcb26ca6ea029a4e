"""What a name stands for: a known model, one on a hub, or what lies at a path of this machine."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from gemma_tune.disk import read_json_object
from gemma_tune.errors import GemmaTuneError, ModelError
from gemma_tune.models.catalogue import LIST_HINT, NOT_KNOWN, GemmaModel, look_up, unknown_name
from gemma_tune.models.config import TextConfig
from gemma_tune.models.directory import check_directory
from gemma_tune.paths import read_table
from gemma_tune.text import did_you_mean, in_shell

Kind = Literal["catalogue", "hub", "kaggle", "model", "run", "adapter", "gguf-file", "exports"]
Wanted = Literal["a model", "a run", "a run or an adapter"]

# huggingface_hub's rule for a repository id: no part starts or ends with - or ., no -- or .., 96 characters in all.
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[.-](?![.-]))*(?<![.-])"
_HUB_ID = re.compile(rf"(?=.{{3,96}}\Z){_HUB_PART}/{_HUB_PART}", re.ASCII)
# owner/model/framework/variation, and a version number behind it (kagglehub's handle.py).
_PART = r"[A-Za-z0-9][\w.-]*"
KAGGLE_HANDLE = re.compile(
    rf"(?P<page>{_PART}/{_PART})/(?P<framework>[A-Za-z]+)/(?P<variation>{_PART})(?:/(?P<version>\d+))?", re.ASCII
)
_KINDS = cast("dict[Kind, dict[str, Any]]", read_table("models/resolve.toml"))
_WANTED_HINTS: dict[Wanted, str] = {
    "a model": LIST_HINT,
    "a run": "give a directory that `gemma-tune train` made",
    "a run or an adapter": "give a run, one of its checkpoints, or a directory that PEFT saved",
}


@dataclass(frozen=True)
class Resolved:
    """What a user named."""

    name: str  # as it was written
    kind: Kind
    location: str  # the directory or file, or the id on the hub or on Kaggle; for a model what `from_pretrained` takes
    model: GemmaModel | None = None  # its row of the catalogue, where it has one
    config: TextConfig | None = None  # of a model that is known or here; `resolve_model` fills it in

    @property
    def path(self) -> Path:
        return Path(self.location)


def resolve(name: str) -> Resolved:
    """Find out what a name stands for, by looking at which files are there.

    A name of the catalogue wins, unless it is written owner/name and such a directory exists (from_pretrained would
    take the directory, too); then what is at that path; then a Kaggle handle or a hub id.

    Raises:
        ModelError: it is nothing, or a path with nothing that can be used.
    """
    name = name.strip()
    try:
        found = look_up(name)
        path = Path(name).expanduser() if name else None
        exists = path is not None and path.exists()
        if found is not None and not ("/" in name and exists):
            return Resolved(name, "catalogue", found[1], found[0])
        if path is not None and exists:
            return _look_at(name, path)
        is_below_here = path is not None and len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    except (OSError, RuntimeError) as error:
        # No permission, a name too long for the file system, or ~somebody who has no home.
        raise ModelError(f"{name}: cannot be read ({error})") from error
    if KAGGLE_HANDLE.fullmatch(name) and not is_below_here:
        return Resolved(name, "kaggle", name)
    if name.lower().endswith(".gguf"):
        raise ModelError(f"no such file: {name}", hint="gemma-tune export RUN --format gguf-q8_0 makes one")
    if path is not None and len(path.parts) > 1 and _holds_runs(path.parent):
        near = did_you_mean(path.name, (run.parent.name for run in path.parent.glob("*/manifest.json")))
        raise ModelError(
            f"there is no run {name}" + (f"; {near}" if near else ""),
            hint="gemma-tune train RECIPE makes one; of a model on the hub give owner/name",
        )
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    if is_below_here or is_path:
        raise ModelError(f"{name}: no such directory", hint=LIST_HINT)
    if not _HUB_ID.fullmatch(name):
        raise unknown_name(name)
    return Resolved(name, "hub", name)


def _holds_runs(directory: Path) -> bool:
    """Whether runs are there, or would be: `runs` is where they are made."""
    return directory.name == "runs" or next(directory.glob("*/manifest.json"), None) is not None


def _look_at(name: str, path: Path) -> Resolved:
    """Classify what is at a path."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            hint = "Give the directory that holds config.json, a tokenizer and *.safetensors files."
            raise ModelError(f"{name}: is a file, a directory is expected", hint=hint)
        return Resolved(name, "gguf-file", str(path))
    for kind, facts in _KINDS.items():
        found = sorted(path.glob(facts["mark"])) if "mark" in facts else []
        if kind == "gguf-file" and len(found) > 1:
            raise ModelError(f"{path} holds {len(found)} GGUF files", hint=f"name one of them: {found[0]}")
        if found:
            place = {"gguf-file": found[0], "model": path.resolve()}.get(kind, path)
            return Resolved(name, kind, str(place))
    raise ModelError(
        f"{path}: has no config.json as a model has it, nor is it a run (manifest.json), an adapter "
        "(adapter_config.json) or a GGUF file",
        hint="A model directory holds config.json, a tokenizer and *.safetensors files.",
    )


def require(named: Resolved, wanted: Wanted, *, error: type[GemmaTuneError] = ModelError) -> Resolved:
    """Refuse what is of another kind than a command takes, with the command that takes it."""
    facts = _KINDS[named.kind]
    if wanted in facts["is"]:
        return named
    title = facts["title"]
    if named.kind == "adapter":
        base = (
            read_json_object(named.path / "adapter_config.json", error=ModelError).get("base_model_name_or_path")
            or NOT_KNOWN
        )
        title = f"a LoRA adapter for the base model {base!r}"
    hint: str = facts.get("instead", {}).get(wanted, _WANTED_HINTS[wanted])
    hint = hint.format(name=named.name, word=in_shell(named.name))
    raise error(f"{named.name} is {title}, {wanted} is expected", hint=hint)


def refuse_other(path: Path, wanted: Wanted, *, error: type[GemmaTuneError]) -> None:
    """Refuse a path at which something else was found than is wanted; return where nothing is known by that name."""
    try:
        named = resolve(str(path))
    except ModelError:
        return
    if named.kind != "hub":  # any two words with a slash between them
        require(named, wanted, error=error)


def resolve_model(name: str) -> Resolved:
    """Resolve the name of a model to load; the files of a local one are checked before anything opens them.

    `config` stays None for an id outside the catalogue: download its config.json and pass it to `config.check_config`
    before anything loads the model.

    Raises:
        ModelError: as `resolve`, or it is not a model, or not a whole Gemma.
    """
    named = require(resolve(name), "a model")
    if named.kind == "model":
        return replace(named, config=check_directory(named.path))
    return replace(named, config=named.model.config) if named.model is not None else named
