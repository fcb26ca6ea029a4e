"""What the hub says about a model, asked before anything is downloaded or loaded; and which models lie here already.

Every question has a deadline, name resolution included: without a network the answer comes within HUB_SECONDS.
"""

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import MODELS, look_up
from gemma_tune.models.directory import check_directory
from gemma_tune.text import did_you_mean, listed

HUB_SECONDS = 6.0
_NUM_SHOWN = 4
# Both become names of files in the cache.
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `sha256` (hex) is known of large files only."""

    name: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubModel:
    """A repository that this machine may read, at one commit. `revision` is what was asked for; None is the newest."""

    hub_id: str
    revision: str | None
    commit: str
    files: tuple[HubFile, ...]


def ask_hub(hub_id: str, *, revision: str | None = None) -> HubModel:
    """The files of a model on the hub, once it is sure that this machine may download them.

    Raises:
        ModelError: gated (no login, or licence not accepted), no such model or revision, no transformers model, or no
            answer (within HUB_SECONDS, from an overloaded hub, in offline mode).
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return _within(HUB_SECONDS, lambda: _ask(hub_id, revision))
    except TimeoutError:
        raise _unreachable(hub_id, f"no answer within {HUB_SECONDS:.0f} s") from None
    except OfflineModeIsEnabled:
        raise _unreachable(hub_id, "HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as error:
        raise _refused(error, hub_id, revision) from None
    except OSError as error:
        raise _unreachable(hub_id, reason_of(error)) from None
    except (ValueError, TypeError, KeyError):
        raise _unreachable(hub_id, "what answers is no hub (a log-in page of the network, or HF_ENDPOINT?)") from None


def cached_directory(hub_id: str, *, revision: str | None = None) -> Path | None:
    """The snapshot in the hub cache, if all of the model is there; no network is used."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    try:
        check_directory(Path(config).parent)
    except ModelError:
        return None
    return Path(config).parent


def cached_models() -> list[str]:
    """The hub ids of the Gemmas that lie whole in the hub cache, those of the catalogue first."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*"))
    ids = [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]
    known = {name for model in MODELS.values() for name in model.names}
    return [hub_id for hub_id in sorted(ids, key=lambda name: name not in known) if cached_directory(hub_id)]


def reason_of(error: Exception) -> str:
    """The first line of what a network error says, without the number of the operating system."""
    said = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"^\[Errno -?\d+\] ", "", said) or type(error).__name__


def _within(seconds: float, work: Callable[[], _Answer]) -> _Answer:
    """The result of `work`, or TimeoutError. Its thread is left behind then: a name look-up cannot be interrupted."""
    answer: Future[_Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # handed to the caller
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=seconds)


def _ask(hub_id: str, revision: str | None) -> HubModel:
    import httpx
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
        files = tuple(
            HubFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None)
            for item in info.siblings or ()
        )
        if "config.json" not in {file.name for file in files}:
            raise ModelError(
                f"{hub_id} has no config.json: it is no transformers model (GGUF, Keras or an adapter?)",
                hint="known names: gemma-tune models list",
            )
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit) or not all(_SHA256.fullmatch(file.sha256 or "0" * 64) for file in files):
            raise ValueError("hashes that are none")
        # A gated repository tells everybody its file list; only a file itself shows whether this machine may read it.
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json", revision=commit), timeout=HUB_SECONDS)
    except httpx.TimeoutException:
        raise TimeoutError from None
    except httpx.TransportError as error:
        raise OSError(reason_of(error)) from None
    return HubModel(hub_id, revision, commit, files)


def _refused(error: Any, hub_id: str, revision: str | None) -> ModelError:
    """The error of an answer of the hub with a status of 400 or above."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    said = f"{error.server_message or ''} {error.response.headers.get('X-Error-Message', '')}".lower()
    page = f"https://huggingface.co/{hub_id}"
    if status == 401 and get_token() is not None:
        return ModelError(
            f"the hub does not know this machine's token (it may be expired), so {hub_id} cannot be read",
            hint="log in again: hf auth login; or correct HF_TOKEN, which comes before the login",
        )
    if isinstance(error, GatedRepoError) and status == 401:
        return ModelError(
            f"{hub_id} is gated, and this machine is not logged in to the hub",
            hint=f"accept the licence at {page}, then: hf auth login (or set HF_TOKEN){_mirror_hint(hub_id)}",
        )
    if isinstance(error, GatedRepoError) and "fine-grained" in said:
        return ModelError(
            f"{hub_id} is gated, and this machine's token may not read gated repositories",
            hint="allow it at https://huggingface.co/settings/tokens: edit the token, "
            "'Read access to contents of all public gated repos you can access'",
        )
    if isinstance(error, GatedRepoError):
        waits = "awaiting" in said
        return ModelError(
            f"{hub_id} is gated, and the account of this machine's token has "
            + ("asked for access and has no answer yet" if waits else "not accepted its licence"),
            hint=("wait for the answer" if waits else "accept it")
            + f" at {page}, logged in as that account{_mirror_hint(hub_id)}",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f"{hub_id} has no revision {revision!r}",
            hint="set model.revision to a commit, tag or branch, or leave it out",
        )
    if isinstance(error, RepositoryNotFoundError):
        near = did_you_mean(hub_id.lower(), [name.lower() for model in MODELS.values() for name in model.names])
        return ModelError(
            f"the hub has no model {hub_id}, or it is private and this machine may not see it",
            hint=f"{near} known names: gemma-tune models list; for a private one: hf auth login".lstrip(),
        )
    return _unreachable(hub_id, f"it answers with status {status}")


def _unreachable(hub_id: str, why: str) -> ModelError:
    here = cached_models()
    shown = listed(here, shown=_NUM_SHOWN)
    return ModelError(
        f"{hub_id} is not on this machine, and the hub cannot be asked: {why}",
        hint=f"connect and try again, or take a model that is here (model.name=…): {shown or 'gemma-tiny, built in'}"
        f"; a directory works, too",
    )


def _mirror_hint(hub_id: str) -> str:
    known = look_up(hub_id)
    mirror = known and known[0].mirror_16bit
    if mirror is None or mirror == hub_id:
        return ""
    return f"; or take the copy that asks for no login, under the same licence: model.name={mirror}"
