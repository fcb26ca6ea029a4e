"""SHA-256 of large files that is asked for again: kept in the cache under a stamp that every change of a file moves."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object, write_json
from gemma_tune.errors import GemmaTuneError
from gemma_tune.identity import files_sha256, text_sha256
from gemma_tune.paths import cache_dir

# A file that was changed this lately (ns) may change once more without a new stamp: clocks of file systems are coarse.
_UNSETTLED_NS = 2_000_000_000


def cached_sha256(paths: Sequence[Path]) -> dict[str, str]:
    """Return file name -> SHA-256 of files of one directory, sorted by name; what has not changed is not read again."""
    if not paths:
        return {}
    store = cache_dir() / "hashes" / f"{text_sha256(str(paths[0].parent.resolve()))[:32]}.json"
    known = _read(store)
    stamps = {path.name: _stamp(path) for path in paths}
    unknown = [path for path in paths if path.name not in known or known[path.name]["stamp"] != stamps[path.name]]
    hashes = files_sha256(unknown)
    settled_ns = time.time_ns() - _UNSETTLED_NS
    fresh = {
        path.name: {"stamp": stamps[path.name], "sha256": hashes[path.name]}
        for path in unknown
        if _stamp(path) == stamps[path.name] and max(stamps[path.name][1:3]) < settled_ns
    }
    if fresh:
        with suppress(OSError, GemmaTuneError):  # a cache that cannot be written costs time, nothing else
            store.parent.mkdir(parents=True, exist_ok=True)
            write_json(store, known | fresh)
    return {name: hashes[name] if name in hashes else known[name]["sha256"] for name in sorted(stamps)}


def _read(store: Path) -> dict[str, Any]:
    try:
        known = read_json_object(store)
    except GemmaTuneError:
        return {}
    return {
        name: entry for name, entry in known.items() if isinstance(entry, dict) and entry.keys() >= {"stamp", "sha256"}
    }


def _stamp(path: Path) -> list[int]:
    """Bytes, times of change of content and of the file's entry (which no program sets back), and inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
