"""Files and directories that bear their name only when they are complete: written next to it, flushed, renamed.

`with output_directory(path) as partial_dir:` and `with output_file(path) as partial_file:` yield where to write. At the
end of the block all of it is flushed and takes its name; after an error or Ctrl-C nothing is left. Nothing is ever
overwritten, two processes never write one output, and an OSError inside the block becomes the caller's `error`.

A killed process leaves its partial output, which the next one to the same path removes; or resumes, when both name
the same `fingerprint` of everything that decides the content, and `keep_file` recorded which files were finished.

`replaced_directory`, `write_text` and `write_json` keep what was there until the new content is whole, and
`write_generated` replaces only what it wrote. Text that is written here has its credentials masked.
"""

import errno
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma_tune.errors import ExportError, GemmaTuneError, RunError
from gemma_tune.identity import file_stamp
from gemma_tune.secrets import mask_secrets
from gemma_tune.text import format_bytes

ErrorClass = type[GemmaTuneError]
_RECORD_FILE = ".finished.json"
_NEXT_CONTENT = re.compile(r"\..+\.\d+\.tmp")  # what `write_text` renames
GENERATED = "generated-by-gemma-tune"  # in a page that may be replaced by a newer one
MARK = ".made-by-gemma-tune"  # in a working directory that is ours to empty and to remove


# --- text and JSON --------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str, *, error: ErrorClass = RunError) -> None:
    """Replace a file by UTF-8 text, its credentials masked. A reader sees the old file or the new one.

    Half a surrogate pair, which a broken row can hold, is written as an escape sequence, which is JSON's as well.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(mask_secrets(text).encode("utf-8", errors="backslashreplace"))
        sync_file(temporary)
        temporary.replace(path)
    except OSError as cause:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, cause, error=error) from None


def write_generated(path: Path, text: str, *, error: ErrorClass = RunError) -> None:
    """Write a page that may be written again, which holds the word `GENERATED`; a file without it is not replaced."""
    path = path.resolve()
    try:
        if path.exists() and not (path.is_file() and GENERATED.encode() in path.read_bytes()):
            raise error(
                f"{path} exists, and is not a page that gemma-tune wrote", hint="give another name, or remove it"
            )
    except OSError as cause:
        raise cannot_write(path, cause, error=error) from None
    write_text(path, text, error=error)


def write_json(path: Path, value: object, *, error: ErrorClass = RunError) -> None:
    """Replace a file by the `to_json` of a value."""
    write_text(path, to_json(value), error=error)


def to_json(value: object) -> str:
    """Return the one form in which JSON files are written; JSON has no NaN and no infinity, they become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_json_lines(rows: Iterable[object]) -> str:
    """Return one JSON value a line."""
    return "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path, *, error: ErrorClass = RunError, hint: str | None = None) -> Any:
    """Read a JSON file; a missing, unreadable or broken one is an `error` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path.parent} has no {path.name}", hint=hint) from None
    except OSError as cause:
        raise error(f"cannot read {path}: {reason_of(cause)}", hint=hint) from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged: not JSON ({cause})", hint=hint) from None


def read_json_object(path: Path, *, error: ErrorClass = RunError, hint: str | None = None) -> dict[str, Any]:
    """Read a JSON file that holds an object, as `read_json`."""
    value = read_json(path, error=error, hint=hint)
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: not a mapping", hint=hint)
    return value


def cannot_write(path: Path, cause: OSError, *, error: ErrorClass = RunError) -> GemmaTuneError:
    """Return the error of a file that could not be written, with the free space where that is short."""
    is_full = cause.errno == errno.ENOSPC
    free = f"; {format_bytes(free_bytes(path), digits=2)} are free there" if is_full else ""
    return error(
        f"cannot write {path}: {reason_of(cause)}{free}",
        hint="make space, and run the command again (a training: with --resume)" if is_full else None,
    )


def reason_of(cause: OSError) -> str:
    """Return what the system says, in lower case."""
    return (cause.strerror or str(cause)).lower()


# --- durability, locks, free space ----------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make a file durable, or a directory with all that is in it."""
    if not path.is_dir():
        sync_file(path)
        return
    for child in path.iterdir():
        sync_tree(child)
    sync_directory(path)


@contextmanager
def locked(path: Path, *, shared: bool = False, patience_seconds: float = 0) -> Iterator[bool]:
    """Open a file or directory and lock it; yield whether it is ours alone, or `shared` with others, for the block.

    With patience it is asked for again: others may only have looked.

    The system drops the lock with its process, however that ends, and there is no lock file to be left behind. Where
    there are no locks (Windows, a mounted Drive or bucket) the answer is yes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        until = time.monotonic() + patience_seconds
        while not (is_locked := _take_lock(descriptor, shared=shared)) and time.monotonic() < until:
            time.sleep(0.02)
        # The second test: its last holder may have renamed or removed it between our opening and locking it.
        yield is_locked and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, *, shared: bool) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that a path is on; the path need not exist yet."""
    return shutil.disk_usage(nearest_directory(path)).free


def nearest_directory(path: Path) -> Path:
    """Return the path itself when it is a directory, else the nearest of its parents that is one."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def require_free_disk(
    path: Path,
    needed_bytes: int,
    *,
    what: str,
    error: ErrorClass = ExportError,
    hint: str = "free some disk, or give an output on another one",
    spare_bytes: int = 64 << 20,
) -> None:
    """Refuse to write `what` where the disk has no room for it, and for the spare bytes.

    What a killed process left of an output at `path` counts as free.
    """
    free = free_bytes(path) + _allocated_bytes(_partial_path(path))
    if free < needed_bytes + spare_bytes:
        raise error(
            f"{path}: {what} needs {format_bytes(needed_bytes, digits=2)}, {format_bytes(free, digits=2)} are free"
            + (f", and {format_bytes(spare_bytes)} have to stay free" if spare_bytes else ""),
            hint=hint,
        )


def directory_bytes(directory: Path) -> int:
    """Return bytes of all files in the directory and below it; a link counts as the file it names, as a copy would."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _allocated_bytes(path: Path) -> int:
    """Return bytes on the disk, not lengths: a file whose length is set before it is filled has holes."""
    files = [child for child in path.rglob("*") if child.is_file()] if path.is_dir() else [path]
    if sys.platform == "win32":
        return sum(file.stat().st_size for file in files if file.exists())
    return sum(file.stat().st_blocks * 512 for file in files if file.exists())


# --- whose directory it is ------------------------------------------------------------------------------------------


def claim_directory(directory: Path, *, error: ErrorClass) -> None:
    """Make a working directory and mark it as ours, or find it so; one that holds something else is refused."""
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / MARK
    if directory.is_symlink() or (not mark.is_file() and any(directory.iterdir())):
        raise error(
            f"{directory} is needed for work in progress, and holds what gemma-tune did not make",
            hint="move it away, or give another output",
        )
    mark.touch()


@contextmanager
def shared_directory(
    directory: Path, *, sweeps: Sequence[Path] = (), error: ErrorClass = ExportError
) -> Iterator[None]:
    """Claim a directory that several processes work in; the last one to leave without an error removes it.

    Args:
        sweeps: finished outputs from which the last one removes what a killed process left.
    """
    with ExitStack() as stack:
        is_here = False
        while not is_here:  # again while another process removes it
            with suppress(FileNotFoundError):
                claim_directory(directory, error=error)
                is_here = stack.enter_context(locked(directory, shared=True))
            time.sleep(0 if is_here else 0.05)
        yield
    with suppress(OSError), locked(directory) as is_last:
        if is_last:
            for output in sweeps:
                _sweep_leftovers(output)
            _empty(directory, all_but={MARK})
            (directory / MARK).unlink()
            directory.rmdir()


# --- directories that replace another -------------------------------------------------------------------------------


@contextmanager
def replaced_directory(
    directory: Path, *, explain: Callable[[Exception], Exception], displace: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """Yield an empty directory next to `directory`; at the end of the block it is flushed and takes its place.

    Args:
        explain: what is raised in place of an exception; it is asked before the partial directory is removed.
        displace: what happens to an earlier directory, once the new one is whole.
    """
    partial = _partial_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        if directory.is_symlink() or directory.exists():
            (displace or _remove)(directory)
        partial.rename(directory)
        sync_directory(directory.parent)
    except Exception as cause:
        explained = explain(cause)
        if explained is cause:
            raise
        raise explained from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- outputs that are never overwritten -----------------------------------------------------------------------------


@contextmanager
def output_directory(
    output: Path, *, fingerprint: str | None = None, error: ErrorClass = ExportError
) -> Iterator[Path]:
    """Yield a directory next to the output; it becomes the output, which may exist as an empty directory only.

    With a fingerprint, what a killed process with the same one finished is still there: see `finished_files`.
    """
    with _renamed_when_complete(output, error=error) as partial_dir:
        is_ours = fingerprint is not None and _read_record(partial_dir)["fingerprint"] == fingerprint
        kept = finished_files(partial_dir) if is_ours else set()
        _empty(partial_dir, all_but={MARK, *kept, *([_RECORD_FILE] if kept else [])})
        if fingerprint and not kept:
            write_json(partial_dir / _RECORD_FILE, {"fingerprint": fingerprint, "files": {}}, error=error)
        yield partial_dir
        (partial_dir / _RECORD_FILE).unlink(missing_ok=True)


@contextmanager
def output_file(output: Path, *, error: ErrorClass = ExportError) -> Iterator[Path]:
    """Yield a file next to the output, to be written in place; it becomes the output, which must not exist."""
    with _renamed_when_complete(output, file_name=output.name, error=error) as partial_dir:
        _empty(partial_dir, all_but={MARK})
        partial_file = partial_dir / output.name
        partial_file.touch()
        yield partial_file


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
    """Return the names of the files that `keep_file` recorded and nobody has touched since."""
    return {
        name
        for name, stamp in _read_record(partial_dir)["files"].items()
        if (partial_dir / name).is_file() and file_stamp(partial_dir / name) == stamp
    }


def refuse_existing(output: Path, *, error: ErrorClass = ExportError) -> None:
    """Refuse an output that exists; an empty directory counts as none."""
    if output.is_symlink() or output.exists():
        if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
            return
        raise error(
            f"{output} exists" + (" and is not an empty directory" if output.is_dir() else ""),
            hint="give another path, or remove this one yourself; nothing is ever overwritten",
        )


def _partial_path(output: Path) -> Path:
    return output.absolute().parent / f".{output.name}.partial"


@contextmanager
def _renamed_when_complete(output: Path, *, error: ErrorClass, file_name: str = "") -> Iterator[Path]:
    """Yield a directory that becomes the output at the end; with `file_name` that file in it does."""
    partial = _partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # Two writers of one output are kept apart by a lock on what they write, which therefore is written in place.
        with locked(partial) as is_ours:
            if not is_ours:
                raise error(f"another process is writing {output}", hint="wait for it, or give another path")
            claim_directory(partial, error=error)
            try:
                refuse_existing(output, error=error)
                yield partial
                sync_tree(partial)
                refuse_existing(output, error=error)
                if output.is_dir():
                    output.rmdir()
                (partial / file_name).rename(output)
                (partial if file_name else output).joinpath(MARK).unlink()  # now: without it nobody may remove it
                if file_name:
                    partial.rmdir()
                sync_directory(partial.parent)
            except BaseException:
                with suppress(OSError):
                    _remove(partial)
                raise
    except OSError as cause:
        where = f" ({cause.filename})" if cause.filename else ""
        raise error(
            f"cannot write {output}: {cause.strerror or cause}{where}",
            hint="nothing was kept; fix the cause and try again",
        ) from cause


def _remove(path: Path) -> None:
    """Remove a file, a directory with what is in it, or a link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _empty(directory: Path, *, all_but: set[str]) -> None:
    for child in directory.iterdir():
        if child.name not in all_but:
            _remove(child)


def _sweep_leftovers(directory: Path) -> None:
    for path in list(directory.iterdir()):
        if path.name == MARK or _NEXT_CONTENT.fullmatch(path.name) or (is_leftover(path) and (path / MARK).is_file()):
            _remove(path)


def is_leftover(path: Path) -> bool:
    """Whether what lies in an output may be what a killed process left, and is no part of it."""
    return path.name == MARK or (path.name.startswith(".") and path.suffix in (".tmp", ".partial"))


def is_next_content(name: str, of: Container[str]) -> bool:
    """Whether a file is one of those named, or what a killed process left of writing one."""
    return name in of or (_NEXT_CONTENT.fullmatch(name) is not None and name[1:].rsplit(".", 2)[0] in of)


def _read_record(partial_dir: Path) -> dict[str, Any]:
    """Return {fingerprint, files: {name: stamp}}; it is replaced atomically, so what is there is whole."""
    try:
        record: dict[str, Any] = json.loads((partial_dir / _RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"fingerprint": None, "files": {}}
    return record
