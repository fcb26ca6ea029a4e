"""Encoded rows on disk; kept as the token cache under a key of everything that decides them.

An entry is written beside and renamed, so that a reader sees a whole one or none and two runs that write the same
entry do not disturb each other. Entries hold the user's rows and are readable by the user alone (S9).
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from gemma_tune.data.data_report import DataReport
from gemma_tune.data.encode.arrays import EncodedRows, Ints, starts_of
from gemma_tune.data.encode.encode_rows import Datasets, Side
from gemma_tune.data.inputs import Inputs
from gemma_tune.data.rows.read import examples_sha256
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.spool import Lines, LineWriter, example_from_json, example_to_json
from gemma_tune.disk import MARK, claim_directory, directory_bytes, locked
from gemma_tune.errors import DataError
from gemma_tune.identity import files_sha256, json_sha256
from gemma_tune.paths import CACHE_VARIABLE, cache_dir
from gemma_tune.recipe.schema import DataSection

_FACTS = "facts.json"
_TOKEN_IDS, _SUPERVISED, _ROWS = "token_ids.int32", "supervised.bool", "rows.npz"
_LINES: Mapping[Side, str] = {"train": "train_places.jsonl", "eval": "eval_examples.jsonl"}
_FILES = (_TOKEN_IDS, _SUPERVISED, _ROWS, *_LINES.values())
_NO_ROWS = np.zeros(0, dtype=np.int64)
# Raise it with every change that makes other token ids, labels, places or reports of the same rows: entries of an older
# format are then encoded again. tests/data/encode/test_golden.py fails where that was forgotten.
ENCODING_FORMAT = 2
# What renders and tokenizes; a new release of one of them may read the same rows otherwise.
_PACKAGES = ("jinja2", "tokenizers", "transformers")
_PII_PACKAGES, _ENCODING_PACKAGES = ("phonenumbers", "python-stdnum"), ("ftfy",)


def cache_key(section: DataSection, inputs: Inputs, *, tokenizer_files: Mapping[str, str]) -> str:
    """Hash what decides the encoded rows: rows, templates, settings, tokenizer, libraries and ENCODING_FORMAT."""
    packages = (
        *_PACKAGES,
        *(_PII_PACKAGES if section.clean.pii != "keep" else ()),
        *(_ENCODING_PACKAGES if section.clean.fix_encoding else ()),
    )
    decided = {
        "format": ENCODING_FORMAT,
        "rows": examples_sha256(section, inputs, chat=None),
        # An entry holds places and a report, which name the source.
        "labels": [(item.source.label, item.detected, item is inputs.eval) for item in inputs.all],
        "tokenizer": dict(tokenizer_files),
        "packages": {name: version(name) for name in packages},
    }
    return json_sha256(decided)


def read_entry(key: str) -> Datasets | None:
    """Read an entry; None where there is none or a byte of it has changed."""
    path = _entries() / key
    try:
        facts: dict[str, Any] = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        if facts["sha256"] != _hashes(path):
            _remove_entry(path)
            return None
        return _map_entry(path, TypeAdapter(DataReport).validate_python(facts["report"]), cached=True)
    except FileNotFoundError:
        if path.exists():  # a file of it is gone
            _remove_entry(path)
        return None
    except (OSError, ValueError, KeyError):
        return None


class EntryWriter:
    """An entry while it grows, in a directory of its own."""

    def __init__(self, directory: Path, files: ExitStack) -> None:
        """Open its files; `files` closes them."""
        self.directory = directory
        opened = {name: files.enter_context((directory / name).open("wb")) for name in _FILES if name != _ROWS}
        self._token_ids, self._supervised = opened[_TOKEN_IDS], opened[_SUPERVISED]
        self._lengths: dict[Side, list[Ints]] = {"train": [], "eval": []}
        self._lines: dict[Side, LineWriter] = {side: LineWriter(opened[name]) for side, name in _LINES.items()}
        self._opened = opened.values()

    def add(self, side: Side, rows: EncodedRows, examples: Sequence[Example]) -> None:
        """Append rows without gaps between them, and what they were made of; all of train before those of eval."""
        self._token_ids.write(rows.token_ids.data)
        self._supervised.write(rows.supervised.data)
        self._lengths[side].append(rows.lengths)
        for example in examples:
            self._lines[side].append(example.where if side == "train" else example_to_json(example))

    def finish(self, report: DataReport) -> Datasets:
        """Write what is left, and map it all."""
        arrays = {f"{side}_lengths": np.concatenate([_NO_ROWS, *parts]) for side, parts in self._lengths.items()}
        arrays |= {f"{side}_line_starts": lines.starts for side, lines in self._lines.items()}
        np.savez(self.directory / _ROWS, allow_pickle=False, **arrays)
        for file in self._opened:
            file.flush()
        return _map_entry(self.directory, report, cached=False)


@contextmanager
def new_entry(*, cached: bool) -> Iterator[EntryWriter]:
    """A place for an entry: in the cache, or where the system keeps temporary files ($TMPDIR).

    It is gone at the end unless `keep_entry` gave it its name; what was mapped from it stays readable (POSIX).

    Raises:
        DataError: the disk is full.
    """
    directory = _new_directory(cached=cached)
    try:
        with ExitStack() as files:
            files.enter_context(locked(directory))
            claim_directory(directory, error=DataError)
            yield EntryWriter(directory, files)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"no space is left for the encoded rows in {directory.parent}",
            hint=f"free some, or name a directory on another disk as {CACHE_VARIABLE if cached else 'TMPDIR'}",
        ) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def keep_entry(key: str, writer: EntryWriter, report: DataReport) -> None:
    """Give a finished entry its name. A cache that cannot be written is none: nothing is raised."""
    path = _entries() / key
    try:
        text = json.dumps({"report": asdict(report), "sha256": _hashes(writer.directory)}, ensure_ascii=False)
        (writer.directory / _FACTS).write_text(text, encoding="utf-8")
        if writer.directory.parent == path.parent:
            writer.directory.rename(path)
    except OSError:  # no space, or another run was faster: its entry is as good
        return


def _new_directory(*, cached: bool) -> Path:
    if cached:
        parent = _entries()
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".", dir=parent))
        except OSError:
            pass
    return Path(tempfile.mkdtemp(prefix="gemma-tune-"))


def _map_entry(path: Path, report: DataReport, *, cached: bool) -> Datasets:
    with np.load(path / _ROWS, allow_pickle=False) as rows:
        lengths = [rows["train_lengths"], rows["eval_lengths"]]
        line_starts: dict[Side, Ints] = {"train": rows["train_line_starts"], "eval": rows["eval_line_starts"]}
    token_ids = np.memmap(path / _TOKEN_IDS, dtype=np.int32, mode="r")
    supervised = np.memmap(path / _SUPERVISED, dtype=np.bool_, mode="r")
    starts = np.split(starts_of(np.concatenate(lengths)), [len(lengths[0])])
    train, held_out = (EncodedRows(token_ids, supervised, *rows) for rows in zip(starts, lengths, strict=True))
    with (path / _LINES["train"]).open("rb") as places, (path / _LINES["eval"]).open("rb") as examples:
        train_places = Lines(places, line_starts["train"], decode=str)
        eval_examples = Lines(examples, line_starts["eval"], decode=example_from_json)
    return Datasets(train, held_out, train_places, eval_examples, report, cached)


def clear_cache() -> tuple[int, int]:
    """Remove every entry that no process is writing; returns how many there were and their bytes."""
    root = _entries()
    removed = num_bytes = 0
    for path in [path for path in root.iterdir() if _is_entry(path)] if root.is_dir() else []:
        with locked(path) as is_ours:
            if is_ours:
                removed, num_bytes = removed + 1, num_bytes + directory_bytes(path)
                shutil.rmtree(path, ignore_errors=True)
    return removed, num_bytes


def _remove_entry(path: Path) -> None:
    if _is_entry(path):
        shutil.rmtree(path, ignore_errors=True)


def _is_entry(path: Path) -> bool:
    """Whether a directory is an entry, or one that a killed process left: we made it, and it holds nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {child.name for child in path.iterdir()}
    return names <= {*_FILES, _FACTS, MARK} and (MARK in names or (not names and path.name.startswith(".")))


def _hashes(directory: Path) -> dict[str, str]:
    return files_sha256([directory / name for name in _FILES])


def _entries() -> Path:
    return cache_dir() / "tokens"
