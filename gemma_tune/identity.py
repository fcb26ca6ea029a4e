"""What decides a result, in a form to keep and to compare: files and values by SHA-256, packages by their version."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits; the file is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path]) -> dict[str, str]:
    """Return file name -> SHA-256, sorted by name. Two files are hashed at once: hashlib releases the interpreter."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(sorted(zip((path.name for path in paths), pool.map(file_sha256, paths), strict=True)))


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8; lone surrogates count as the bytes they stand for."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def json_sha256(value: object) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return text_sha256(json.dumps(value, sort_keys=True))


def file_stamp(path: Path) -> list[int]:
    """Return bytes and time of the last change (ns): enough to see that a file was replaced, without reading it."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def fingerprint_of(sources: Iterable[Path], *facts: object) -> str:
    """Return a hash of what an output is made from, and by: source files by their stamps, everything else by its repr.

    A file counts as unchanged while its path and stamp are: hashing a base takes longer than merging it.
    """
    stamps = [(path.resolve(), file_stamp(path)) for path in sorted(set(sources))]
    return text_sha256(repr((stamps, facts)))


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
