"""From a model's name to a directory on this machine, downloading it once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.files import has_chat_template
from gemma_tune.models.registry import GemmaModel, resolve_model

# Weights in safetensors only: pickled ones are never loaded (S1). GGUF and Keras files of the same repository are
# left out.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")
_UNWANTED = ("original/*", "*/*.safetensors")


@dataclass(frozen=True)
class LocalModel:
    """A base model whose files are here.

    Attributes:
        name: as the user gave it.
        directory: the Hugging Face directory.
        revision: hub commit; None for a local directory.
        config: the facts of its config.json.
        model: its registry row, where it has one.
    """

    name: str
    directory: Path
    revision: str | None
    config: TextConfig
    model: GemmaModel | None

    @property
    def knows_chat_turns(self) -> bool:
        """Whether it is instruction-tuned; a model that is not in the registry is when it has a chat template."""
        if self.model is not None:
            return self.model.is_instruction_tuned
        return has_chat_template(self.directory)


def fetch_model(name: str, *, revision: str | None = None) -> LocalModel:
    """Find or download a model.

    Raises:
        ModelError: unknown name, no Gemma, gated, or not reachable; the message says which, and what to do.
    """
    source = resolve_model(name)
    if source.kind == "directory" or Path(source.location).is_dir():
        directory = Path(source.location)
        return LocalModel(name, directory, None, read_config(directory), source.model)
    directory = _download(source.location, revision=revision)
    # The hub cache names a snapshot's folder after its commit.
    return LocalModel(name, directory, directory.name, read_config(directory), source.model)


def _download(hub_id: str, *, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED))
        )
    except GatedRepoError:
        raise ModelError(
            f"{hub_id} is gated, and this machine's hub account has no access",
            hint=f"accept the licence at https://huggingface.co/{hub_id}, then `hf auth login` with a token that "
            f"may read gated repositories",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{hub_id} has no revision {revision!r}",
            hint="set model.revision to a commit, tag or branch, or leave it out",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model {hub_id}, or it is private and this machine is not logged in",
            hint="known names: gemma-tune models list; log in with: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{hub_id} is not on this machine, and the hub cannot be reached ({type(error).__name__})",
            hint="connect and try again, give a local directory as model.name, or try model.name=gemma-tiny, which "
            "is built in",
        ) from None
