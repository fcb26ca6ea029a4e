"""Downloads a model into the hub cache: what is needed and no more, resumed after a kill, each file's hash checked.

huggingface_hub 1.33 begins a file again after an interruption: it downloads into a file of a random name and removes it
(file_download.py, _download_to_tmp_and_move). The large files are therefore fetched here, into the place in the cache
where huggingface_hub looks for them; it does the rest.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gemma_tune.disk import require_free_disk, sync_directory, sync_file
from gemma_tune.errors import ModelError
from gemma_tune.models.hub.access import HubFile, HubModel, reason_of
from gemma_tune.models.safetensors import INDEX_FILE, SMALL_FILES, WEIGHTS_FILE

Progress = Callable[[int, int], None]

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)
_NUM_AT_ONCE = 4
_CHUNK_BYTES = 2**20
_READ_SECONDS = 20.0
_MAX_FAILURES = 5
# Too busy, or broken for the moment: worth another try.
_PASSING = (408, 429, 500, 502, 503, 504)
# What small files, links and the file system's own books take.
_SPARE_BYTES = 100_000_000


def wanted_files(model: HubModel) -> tuple[HubFile, ...]:
    """What loading needs: safetensors weights once, config and tokenizer. No pickle, GGUF, `original/` or duplicates.

    Raises:
        ModelError: the repository has no safetensors weights.
    """
    names = {file.name for file in model.files}
    weights = {WEIGHTS_FILE} & names or {INDEX_FILE, *filter(_SHARD.fullmatch, names)} & names
    if not any(name.endswith(".safetensors") for name in weights):
        others = sorted({Path(name).suffix for name in names if Path(name).suffix in (".bin", ".pth", ".gguf", ".h5")})
        raise ModelError(
            f"{model.hub_id} has no safetensors weights" + (f", only {', '.join(others)}" if others else ""),
            hint="pickle files can run code when they are read and GGUF cannot be trained; take another copy: "
            "gemma-tune models list",
        )
    return tuple(file for file in model.files if file.name in weights or file.name in SMALL_FILES)


def download_model(model: HubModel, *, progress: Progress | None = None) -> Path:
    """Download what is not here yet; returns the directory in the hub cache.

    Args:
        progress: called with the bytes that are here and the bytes of the whole model, from several threads in turn.

    Raises:
        ModelError: not enough disk space, a file whose hash is not the hub's, or a connection that breaks for good.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    files = wanted_files(model)
    store = _store(model.hub_id)
    large = [(file, store / "blobs" / file.sha256) for file in files if file.sha256 is not None]
    missing = [(file, blob) for file, blob in large if not blob.exists()]
    present = sum(file.num_bytes for file, blob in large if blob.exists())
    todo = sum(file.num_bytes - _partial_bytes(blob) for file, blob in missing)
    if todo:
        require_free_disk(
            store, todo, what=f"the rest of {model.hub_id}", error=ModelError, spare_bytes=_SPARE_BYTES,
            hint="free some space, or keep the hub cache on another disk: export HF_HOME=/path/with/room",
        )  # fmt: skip
    total = sum(file.num_bytes for file in files)
    meter = _Meter(present, total, progress or (lambda done, total: None))
    with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        try:
            for done in as_completed(pool.submit(_fetch, model, file, blob, meter) for file, blob in missing):
                done.result()
        except BaseException:  # Ctrl-C too: the other files stop where they are
            meter.is_stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    disable_progress_bars()
    try:
        directory = snapshot_download(
            model.hub_id, revision=model.commit, allow_patterns=[file.name for file in files], max_workers=_NUM_AT_ONCE
        )
        _keep_reference(store, model)
    except OSError as error:
        raise _broken_off(model.hub_id, error) from None
    meter.progress(meter.total, meter.total)
    return Path(directory)


class _Meter:
    """Counts the bytes of files that are fetched at the same time."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self.done, self.total = done, total
        self.progress = progress
        self.is_stopped = False
        self.lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """`num_bytes` may be negative: a file that begins again."""
        with self.lock:
            self.done += num_bytes
            self.progress(self.done, self.total)


def _store(hub_id: str) -> Path:
    """The repository's folder in the hub cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"


def _keep_reference(store: Path, model: HubModel) -> None:
    """Write which commit the branch or tag is, as huggingface_hub does, so that it is found without a network."""
    reference = store / "refs" / (model.revision or "main")
    if model.revision != model.commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(model.commit, encoding="ascii")


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.partial")


def _partial_bytes(blob: Path) -> int:
    partial = _partial(blob)
    return partial.stat().st_size if partial.is_file() else 0


def _fetch(model: HubModel, file: HubFile, blob: Path, meter: _Meter) -> None:
    """Bring one large file to `blob`, whose name is its SHA-256. What was there of it before is kept and checked."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # another process was faster
            meter.add(file.num_bytes)
            return
        partial = _partial(blob)
        resumed = partial.is_file()
        digest = _fill(model, file, partial, meter)
        if digest != file.sha256 and resumed:
            # The old part may have been damaged: once more, from the start.
            meter.add(-_partial_bytes(blob))
            partial.unlink()
            digest = _fill(model, file, partial, meter)
        if digest != file.sha256:
            partial.unlink()
            raise ModelError(
                f"{model.hub_id}: {file.name} arrived damaged: SHA-256 {digest[:12]}…, the hub says "
                f"{(file.sha256 or '')[:12]}…",
                hint="run the command again; if it happens twice, a proxy between here and the hub changes files",
            )
        sync_file(partial)
        partial.replace(blob)
        sync_directory(blob.parent)


def _fill(model: HubModel, file: HubFile, partial: Path, meter: _Meter) -> str:
    """Append to `partial` until it is as long as the file; returns its SHA-256."""
    import httpx

    digest = hashlib.sha256()
    with partial.open("a+b") as stream:
        stream.seek(0)
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
            meter.add(len(block))
        failures = 0
        while stream.tell() < file.num_bytes:
            before = stream.tell()
            try:
                digest = _append(model, file, stream, digest, meter)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _PASSING:
                    raise _broken_off(model.hub_id, error) from None
                failures = failures + 1 if stream.tell() == before else 1
                if failures == _MAX_FAILURES:
                    raise _broken_off(model.hub_id, error) from None
                time.sleep(0.2 * 2**failures)
            except OSError as error:
                raise _broken_off(model.hub_id, error) from None
        if stream.tell() > file.num_bytes:
            return "longer than the file"
    return digest.hexdigest()


def _append(model: HubModel, file: HubFile, stream: Any, digest: Any, meter: _Meter) -> Any:
    """One request for the rest of the file; returns the digest, a new one where the server sends all of it again."""
    from huggingface_hub import get_session, get_token, hf_hub_url

    start = stream.tell()
    token = get_token()
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    url = hf_hub_url(model.hub_id, file.name, revision=model.commit)
    # httpx keeps the token from another host that the hub redirects to.
    with get_session().stream("GET", url, headers=headers, timeout=_READ_SECONDS, follow_redirects=True) as response:
        response.raise_for_status()
        if start and response.status_code != 206:
            stream.seek(0)
            stream.truncate()
            meter.add(-start)
            digest = hashlib.sha256()
        for block in response.iter_bytes(_CHUNK_BYTES):
            if meter.is_stopped:
                raise ModelError(f"the download of {model.hub_id} was stopped")
            stream.write(block)
            digest.update(block)
            meter.add(len(block))
    return digest


def _broken_off(hub_id: str, error: Exception) -> ModelError:
    return ModelError(
        f"the download of {hub_id} broke off: {reason_of(error)}",
        hint="run the command again: it goes on where it stopped",
    )
