"""Outputs that bear their name only when they are complete: written beside it, flushed to the disk, renamed.

`with output_directory(path) as partial_dir:` and `with output_file(path) as partial_file:` yield where to write. At the
end of the block all of it is flushed and takes its name; after an error or Ctrl-C nothing is left. Nothing is ever
overwritten, two processes never write one output, and an OSError inside the block becomes an ExportError.

A killed process leaves its partial output, which the next one to the same path removes; or goes on from, when both name
the same `fingerprint` of everything that decides the content, and `keep_file` recorded which files were finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma_tune.errors import ExportError
from gemma_tune.models.safetensors import file_stamp
from gemma_tune.runs.record import sync_directory, sync_file, take_lock, write_json

_FREE_SLACK_BYTES = 64 << 20
_RECORD_FILE = ".finished.json"


@contextmanager
def output_directory(output: Path, *, fingerprint: str | None = None) -> Iterator[Path]:
    """Yield a directory beside the output; it becomes the output, which may exist as an empty directory only.

    With a fingerprint, what a killed process with the same one finished is still there: see `finished_files`.
    """
    with _renamed_when_complete(output, is_directory=True) as partial_dir:
        kept = (
            finished_files(partial_dir) if fingerprint and _recorded_fingerprint(partial_dir) == fingerprint else set()
        )
        _empty(partial_dir, all_but=kept)
        if fingerprint and not kept:
            write_json(partial_dir / _RECORD_FILE, {"fingerprint": fingerprint, "files": {}})
        yield partial_dir
        (partial_dir / _RECORD_FILE).unlink(missing_ok=True)


@contextmanager
def output_file(output: Path) -> Iterator[Path]:
    """Yield a file beside the output, to be written in place; it becomes the output, which must not exist."""
    with _renamed_when_complete(output, is_directory=False) as partial_file:
        os.truncate(partial_file, 0)
        yield partial_file


def fingerprint_of(sources: Iterable[Path], *facts: object) -> str:
    """A hash of what an output is made from, and by: the source files, and everything else by its repr.

    A file counts as unchanged while its path, length and time of change are: hashing a base takes longer than merging.
    """
    stamps = [(path.resolve(), file_stamp(path)) for path in sorted(set(sources))]
    return hashlib.sha256(repr((stamps, facts)).encode("utf-8")).hexdigest()


def keep_file(partial_dir: Path, name: str) -> None:
    """Flush a finished file of an `output_directory` with a fingerprint, and record it as done.

    Files are recorded one after the other, by one thread.
    """
    sync_file(partial_dir / name)
    sync_directory(partial_dir)
    record = _read_record(partial_dir)
    record["files"][name] = file_stamp(partial_dir / name)
    write_json(partial_dir / _RECORD_FILE, record)


def finished_files(partial_dir: Path) -> set[str]:
    """The names of the files that `keep_file` recorded and nobody has touched since."""
    return {
        name
        for name, stamp in _read_record(partial_dir)["files"].items()
        if (partial_dir / name).is_file() and file_stamp(partial_dir / name) == stamp
    }


def refuse_existing(output: Path) -> None:
    """Refuse an output that exists; an empty directory counts as none."""
    if output.is_symlink() or output.exists():
        if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
            return
        raise ExportError(
            f"{output} exists" + (" and is not an empty directory" if output.is_dir() else ""),
            hint="give another path, or remove this one yourself; nothing is ever overwritten",
        )


def require_free_disk(output: Path, needed_bytes: int, *, what: str) -> None:
    """Refuse an output for which the disk has no room. What a killed process left of it counts as free."""
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free + _allocated_bytes(_partial_path(output))
    if free_bytes < needed_bytes + _FREE_SLACK_BYTES:
        raise ExportError(
            f"{output}: {what} needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free",
            hint="free some disk, or give an output on another one",
        )


def _partial_path(output: Path) -> Path:
    return output.absolute().parent / f".{output.name}.partial"


@contextmanager
def _renamed_when_complete(output: Path, *, is_directory: bool) -> Iterator[Path]:
    partial = _partial_path(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _held(partial, output, is_directory=is_directory):
            try:
                refuse_existing(output)
                yield partial
                _sync_tree(partial)
                refuse_existing(output)
                if output.is_dir():
                    output.rmdir()
                partial.rename(output)
                sync_directory(partial.parent)
            except BaseException:
                with suppress(OSError):
                    _remove(partial)
                raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ExportError(
            f"cannot write {output}: {error.strerror or error}{where}",
            hint="nothing was kept; mend the cause and try again",
        ) from error


@contextmanager
def _held(partial: Path, output: Path, *, is_directory: bool) -> Iterator[None]:
    """Keep two writers of one output apart by a lock on what they write, which therefore is written in place.

    The system drops the lock with its process, however that ends, and there is no lock file to be left behind.
    """
    if is_directory:
        partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY if is_directory else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # The second test: its last holder may have renamed or removed it between our opening and locking it.
        if not take_lock(descriptor) or not _is_at(descriptor, partial):
            raise ExportError(f"another process is writing {output}", hint="wait for it, or give another path")
        yield
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync_tree(path: Path) -> None:
    if not path.is_dir():
        sync_file(path)
        return
    for child in path.iterdir():
        _sync_tree(child)
    sync_directory(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _empty(partial_dir: Path, *, all_but: set[str]) -> None:
    """Remove what is in a directory, but for the files to keep and the record of them."""
    for child in partial_dir.iterdir():
        if not all_but or child.name not in (*all_but, _RECORD_FILE):
            _remove(child)


def _read_record(partial_dir: Path) -> dict[str, Any]:
    """{fingerprint, files: {name: stamp}}; it is replaced atomically, so what is there is whole."""
    try:
        record: dict[str, Any] = json.loads((partial_dir / _RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"fingerprint": None, "files": {}}
    return record


def _recorded_fingerprint(partial_dir: Path) -> str | None:
    fingerprint: str | None = _read_record(partial_dir)["fingerprint"]
    return fingerprint


def _allocated_bytes(path: Path) -> int:
    """Bytes on the disk, not lengths: a file whose length is set before it is filled has holes."""
    files = [child for child in path.rglob("*") if child.is_file()] if path.is_dir() else [path]
    if sys.platform == "win32":
        return sum(file.stat().st_size for file in files if file.exists())
    return sum(file.stat().st_blocks * 512 for file in files if file.exists())
