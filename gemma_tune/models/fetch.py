"""From a model's name to a directory on this machine, downloading it once."""

from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import GemmaModel
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.hub.access import ask_hub, cached_directory
from gemma_tune.models.hub.download import Progress, download_model
from gemma_tune.models.hub.kaggle import download_kaggle_model
from gemma_tune.models.resolve import resolve_model
from gemma_tune.models.safetensors import has_chat_template


@dataclass(frozen=True)
class LocalModel:
    """A base model whose files are here, by the name that the user gave.

    `revision` is the hub's commit, None for a local directory; `model` its row of the catalogue, where it has one."""

    name: str
    directory: Path
    revision: str | None
    config: TextConfig
    model: GemmaModel | None

    @property
    def knows_chat_turns(self) -> bool:
        """Whether it is instruction-tuned; a model that is not in the catalogue is when it has a chat template."""
        if self.model is not None:
            return self.model.is_instruction_tuned
        return has_chat_template(self.directory)


def fetch_model(name: str, *, revision: str | None = None, progress: Progress | None = None) -> LocalModel:
    """Find or download a model.

    What the hub cannot be asked about is taken from the hub cache where all of it is there.

    Args:
        progress: called with the bytes that are here and the bytes of the model while it is downloaded.

    Raises:
        ModelError: unknown name, no Gemma, gated, or not reachable; the message says which, and what to do.
    """
    source = resolve_model(name)
    if source.kind == "kaggle" or source.path.is_dir():
        directory = download_kaggle_model(source.location) if source.kind == "kaggle" else source.path
        return LocalModel(name, directory, None, read_config(directory), source.model)
    directory = _hub_directory(source.location, revision=revision, progress=progress)
    # The hub cache names a snapshot's folder after its commit.
    return LocalModel(name, directory, directory.name, read_config(directory), source.model)


def fetch_config(name: str) -> TextConfig:
    """Read a model's config.json, which is all that is downloaded of it. Raises ModelError as `fetch_model`."""
    source = resolve_model(name)
    if source.config is not None:
        return source.config
    if source.kind == "kaggle":
        return fetch_model(name).config
    here = cached_directory(source.location)
    if here is not None:
        return read_config(here)
    from huggingface_hub import hf_hub_download

    commit = ask_hub(source.location).commit
    return read_config(Path(hf_hub_download(source.location, "config.json", revision=commit)).parent)


def _hub_directory(hub_id: str, *, revision: str | None, progress: Progress | None) -> Path:
    here = cached_directory(hub_id, revision=revision)
    if here is not None and here.name == revision:  # a commit never changes
        return here
    try:
        model = ask_hub(hub_id, revision=revision)
    except ModelError:
        if here is None:
            raise
        return here
    return download_model(model, progress=progress)
