"""Pushes a finished export to the Hugging Face Hub.

What goes up is an allow-list of file names, never a folder: no checkpoint, optimizer state, log or cache can slip in.
All of it goes in one commit, so that a repository never holds half an export; what an interrupted push uploaded already
is not uploaded again. The token comes from the login or HF_TOKEN; it is not an argument of anything here.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json
from gemma_tune.errors import ExportError, HubError
from gemma_tune.exporting.export_record import RECORD_FILE, exports_at, read_record, require_unchanged
from gemma_tune.exporting.formats.registry import FORMATS
from gemma_tune.exporting.text_files import LICENCE_FILES, portable_settings
from gemma_tune.models.safetensors import CONFIG_FILE, SMALL_FILES, weight_files
from gemma_tune.reporting.card import CARD_FILE, REPOSITORY
from gemma_tune.runs.adapter_dir import TEMPLATE_FILE
from gemma_tune.runs.layout import RunDir
from gemma_tune.secrets import mask_private
from gemma_tune.text import in_shell

_NAMES = {CARD_FILE, TEMPLATE_FILE, *LICENCE_FILES, *SMALL_FILES}
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?", re.ASCII)
_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_DEFAULT_MESSAGE = "Upload with gemma-tune"
# Larger ones are a tokenizer or weights, in which no path of a machine stands.
_MAX_SEARCHED_BYTES = 1_000_000


@dataclass(frozen=True)
class PushReport:
    """What went up. `files` are name -> bytes; `left_out` are entries of the directory that are not on the list."""

    url: str
    commit: str
    files: dict[str, int]
    left_out: tuple[str, ...]


def find_export(path: Path) -> Path:
    """The exported directory that a path stands for: itself, or the one export of a run.

    Raises:
        ExportError: there is no such directory, or the run has no export or several.
    """
    if not path.is_dir():
        raise ExportError(
            f"no such directory: {path}", hint="give a run, or a directory that `gemma-tune export` wrote"
        )
    run = RunDir(path)
    if not run.manifest.is_file():
        return path
    found = exports_at(run.exports)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ExportError(
            f"{path} has no export yet", hint=f"make one: gemma-tune export {in_shell(path)} --format adapter"
        )
    raise ExportError(
        f"{path} has {len(found)} exports, and a repository holds one",
        hint="push one of: " + ", ".join(map(str, found)),
    )


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    force: bool = False,
) -> PushReport:
    """Upload an exported directory; the repository is made where there is none. `revision` is a branch.

    Nothing is sent before the local files have been found complete.

    Raises:
        ExportError: the directory is incomplete, failed its check (unless `force`), or holds what must not go public.
        HubError: not logged in, no right to write, or the hub is not reachable. The local files are not touched.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ExportError(f"{repo_id!r} is not a repository on the hub", hint="give OWNER/NAME")
    names = _files_to_push(directory, force=force)
    retry = _retry_command(directory, repo_id, private=private, revision=revision, message=commit_message, force=force)

    import httpx
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise HubError(
            "this machine is not logged in to the hub",
            hint=f"hf auth login, or set HF_TOKEN to a token that may write; then: {retry}",
        )
    try:
        api = HfApi(token=token)
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not api.model_info(repo_id).private:
            raise ExportError(
                f"{repo_id} exists already and is public", hint="make it private on its page, or push to another name"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _refuse_other_weights(api.list_repo_files(repo_id, revision=revision), names, repo_id)
        commit = api.create_commit(
            repo_id,
            operations=[_addition(directory / name, repo_id) for name in names],
            commit_message=commit_message or _DEFAULT_MESSAGE,
            revision=revision,
        )
    # RuntimeError and ValueError: how the client passes on a failed upload of a large file.
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _told(error, directory, repo_id, retry=retry) from error
    return PushReport(
        url=url,
        commit=commit.oid,
        files={name: (directory / name).stat().st_size for name in names},
        left_out=tuple(sorted({path.name for path in directory.iterdir()} - set(names))),
    )


# --- before anything is sent ------------------------------------------------------------------------------------------


def _files_to_push(directory: Path, *, force: bool) -> list[str]:
    if directory.resolve().name.startswith("."):
        raise ExportError(f"{directory} is an export that was not finished", hint="run the same export again")
    _check_record(directory, force=force)
    patterns = [pattern for each in FORMATS.values() for pattern in each.files]
    present = [path.name for path in directory.iterdir()]
    names = sorted(name for name in present if name in _NAMES or any(pattern.fullmatch(name) for pattern in patterns))
    for name in names:
        if (directory / name).is_symlink() or not (directory / name).is_file():
            raise ExportError(f"{directory / name} is not a plain file", hint="copy what it points to in its place")
    _require_weights(directory, names)
    for name in names:
        _refuse_private_text(directory / name)
    return names


def _check_record(directory: Path, *, force: bool) -> None:
    """Compare the files with export.json, where the directory has one, and look at its verdict."""
    if not (directory / RECORD_FILE).is_file():
        return
    record = read_record(directory)
    if record.files is None:
        raise ExportError(f"{directory} was not finished", hint="run the same export again")
    require_unchanged(directory, record)
    if record.passed is False and not force:
        raise ExportError(
            f"{directory} did not pass its check, so others would get another model than the trained one",
            hint=f"see {directory / RECORD_FILE}; push it all the same with --force",
        )


def _require_weights(directory: Path, names: Sequence[str]) -> None:
    """Refuse a directory without the files of any format, or without a shard of its model."""
    if not any(all(any(map(pattern.fullmatch, names)) for pattern in each.files) for each in FORMATS.values()):
        raise ExportError(
            f"{directory} is no export: it has neither an adapter nor a model nor a GGUF file",
            hint="give a directory that `gemma-tune export` wrote",
        )
    if CONFIG_FILE in names:
        weight_files(directory)  # reports a missing shard


def _refuse_private_text(path: Path) -> None:
    """S5: a path below a home folder, a local path in a setting, or a secret."""
    if path.stat().st_size > _MAX_SEARCHED_BYTES or path.suffix in (".safetensors", ".gguf"):
        return
    text = path.read_text(encoding="utf-8")
    private = mask_private(text) != text
    if path.suffix == ".json":
        settings = read_json(path)
        private = private or portable_settings(settings) != settings or _is_local_base(settings)
    if private:
        raise ExportError(
            f"{path} holds a path of this machine or a secret, which would become public",
            hint="an export by `gemma-tune export` holds none; remove it from this file",
        )


def _is_local_base(settings: Any) -> bool:
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return isinstance(name, str) and name.startswith(("/", ".", "~"))


def _refuse_other_weights(remote: Sequence[str], names: Sequence[str], repo_id: str) -> None:
    """Two sets of weights in one repository: a loader would take either, or mix their shards."""
    if not any(_WEIGHTS.fullmatch(name) for name in names):
        return
    other = sorted(name for name in remote if _WEIGHTS.fullmatch(name) and name not in names)
    if other:
        raise ExportError(
            f"{repo_id} holds weights that this export would not replace: {', '.join(other[:4])}",
            hint="push to another repository, or remove them there",
        )


def _addition(path: Path, repo_id: str) -> Any:
    from huggingface_hub import CommitOperationAdd

    if path.name == CARD_FILE:  # the card was written before its repository had a name
        content: str | bytes = path.read_text(encoding="utf-8").replace(REPOSITORY, repo_id).encode("utf-8")
    else:
        content = str(path)
    return CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=content)


def _retry_command(
    directory: Path, repo_id: str, *, private: bool, revision: str | None, message: str | None, force: bool
) -> str:
    options = ["--private"] if private else []
    options += ["--revision", revision] if revision else []
    options += ["--message", message] if message else []
    options += ["--force"] if force else []
    return shlex.join(["gemma-tune", "push", str(directory), repo_id, *options])


# --- what the hub answers ---------------------------------------------------------------------------------------------


def _told(error: BaseException, directory: Path, repo_id: str, *, retry: str) -> HubError:
    """Tell what the hub client raised, in a sentence; the client's own text would hold addresses and request ids."""
    from huggingface_hub.errors import HfHubHTTPError

    response = next((cause.response for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    status = response.status_code if response is not None else None
    if status == 401:
        return HubError("the hub does not accept this machine's token", hint=f"hf auth login, then: {retry}")
    if status in (403, 404):
        return HubError(
            f"this machine's hub account may not write to {repo_id}",
            hint=f"take a token that may write, or another OWNER/NAME; then: {retry}",
        )
    if status is not None and status < 500 and status != 429:
        said = mask_private(str(getattr(error, "server_message", None) or f"status {status}"))
        return HubError(f"the hub refused the upload: {said}", hint=f"mend it, then: {retry}")
    what = f"answered with status {status}" if status else f"cannot be reached ({type(error).__name__})"
    return HubError(
        f"the hub {what}; nothing was lost, {directory} is complete on this machine", hint=f"try again: {retry}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
