"""The token cache: encoded rows on disk, under a key of everything that decides them.

An entry is written beside and renamed, so that a reader sees a whole one or none and two runs that write the same
entry do not disturb each other. Entries hold the user's rows and are readable by the user alone (S9).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.encoded import EncodedRows
from gemma_tune.data.inputs import Inputs
from gemma_tune.data.render import Example
from gemma_tune.data.report import DataReport, SourceReport
from gemma_tune.data.segments import Segment
from gemma_tune.recipe.schema import DataSection

CACHE_VARIABLE = "GEMMA_TUNE_CACHE"
# A file whose presence is an entry's last word: it is written before the rename, after all others.
_FACTS = "facts.json"
_ARRAYS = ("token_ids.npy", "supervised.npy", "rows.npz")
# What renders and tokenizes; a new release of one of them may read the same rows otherwise.
_PACKAGES = ("jinja2", "tokenizers", "transformers")


def cache_dir() -> Path:
    """`$GEMMA_TUNE_CACHE`, or `gemma-tune` in the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-tune"


def cache_key(section: DataSection, inputs: Inputs, *, tokenizer_files: Mapping[str, str]) -> str:
    """A hash of the rows, templates, settings, tokenizer and of the code that encodes them.

    Args:
        section: the whole data section counts, so that a new setting cannot be forgotten here.
        inputs: the opened sources.
        tokenizer_files: file name → SHA-256 of the tokenizer's files.
    """
    decided = {
        "section": section.model_dump(mode="json"),
        "inputs": [
            (item.source.label, item.source.sha256, item.template.sha256, dict(item.columns), item.num_rows)
            for item in inputs.all
        ],
        "tokenizer": dict(tokenizer_files),
        "code": _code_sha256(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode("utf-8")).hexdigest()


@functools.cache
def _code_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_entry(key: str) -> tuple[dict[str, EncodedRows], dict[str, Any]] | None:
    """The rows by side and the facts of an entry, or None where there is none or a byte of it has changed.

    Token ids are mapped from the file, not kept in memory.
    """
    path = _entry(key)
    try:
        facts: dict[str, Any] = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        if facts["sha256"] != {name: _sha256(path / name) for name in _ARRAYS}:
            shutil.rmtree(path, ignore_errors=True)
            return None
        token_ids = np.load(path / "token_ids.npy", mmap_mode="r", allow_pickle=False)
        supervised = np.load(path / "supervised.npy", mmap_mode="r", allow_pickle=False)
        with np.load(path / "rows.npz", allow_pickle=False) as rows:
            sides = {
                side: EncodedRows(token_ids, supervised, rows[f"{side}_starts"], rows[f"{side}_lengths"])
                for side in ("train", "eval")
            }
    except FileNotFoundError:
        if path.exists():  # a file of it is gone
            shutil.rmtree(path, ignore_errors=True)
        return None
    except (OSError, ValueError, KeyError):
        return None
    return sides, facts


def write_entry(key: str, sides: Mapping[str, EncodedRows], facts: Mapping[str, Any]) -> None:
    """Store rows that share one pair of token arrays. A cache that cannot be written is none: nothing is raised."""
    path = _entry(key)
    token_ids, supervised = sides["train"].token_ids, sides["train"].supervised
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=path.parent))
    except OSError:
        return
    try:
        np.save(beside / "token_ids.npy", token_ids, allow_pickle=False)
        np.save(beside / "supervised.npy", supervised, allow_pickle=False)
        arrays = {f"{side}_starts": rows.starts for side, rows in sides.items()}
        arrays |= {f"{side}_lengths": rows.lengths for side, rows in sides.items()}
        np.savez(beside / "rows.npz", allow_pickle=False, **arrays)
        hashes = {name: _sha256(beside / name) for name in _ARRAYS}
        text = json.dumps({**facts, "sha256": hashes}, ensure_ascii=False)
        (beside / _FACTS).write_text(text, encoding="utf-8")
        beside.rename(path)
    except OSError:  # no space, or another run was faster: its entry is as good
        shutil.rmtree(beside, ignore_errors=True)


def clear_cache() -> tuple[int, int]:
    """Remove every entry; returns how many there were and their bytes."""
    root = cache_dir() / "tokens"
    entries = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    num_bytes = sum(file.stat().st_size for path in entries for file in path.rglob("*") if file.is_file())
    for path in entries:
        shutil.rmtree(path, ignore_errors=True)
    return len(entries), num_bytes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(key: str) -> Path:
    return cache_dir() / "tokens" / key


# --- facts as JSON ----------------------------------------------------------------------------------------------------


def report_from(values: Mapping[str, Any]) -> DataReport:
    """A report from its `asdict`, as JSON gives it back."""
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    sources = tuple(SourceReport(**source) for source in values["sources"])
    return DataReport(**{**values, **lists, "sources": sources})


def example_to_json(example: Example) -> dict[str, Any]:
    """All of an example; its key as hexadecimal digits."""
    return asdict(example) | {"key": example.key.hex()}


def example_from(values: Mapping[str, Any]) -> Example:
    """The example that `example_to_json` wrote."""
    segments = tuple(Segment(**segment) for segment in values["segments"])
    return Example(**{**values, "segments": segments, "key": bytes.fromhex(values["key"])})
