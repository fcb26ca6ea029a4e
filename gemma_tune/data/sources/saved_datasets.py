"""Folders that `save_to_disk` of the library datasets wrote: Arrow files of one set of rows, or of several splits."""

import json
import os
from pathlib import Path
from typing import Any

from gemma_tune.data.sources.items import shown
from gemma_tune.errors import DataError

_SET, _SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is such a folder."""
    return any(os.path.isfile(path / name) for name in (_SET, _SPLITS))


def saved_files(path: Path, *, split: str) -> tuple[list[Path], str]:
    """List the files that hold the rows of a split, and give what messages call it.

    Raises:
        DataError: there is no such split, or a file that describes the folder is damaged.
    """
    label = path.resolve().name
    if not (path / _SPLITS).is_file():
        own = _read(path / _SET).get("_split")
        if split not in ("train", own):
            raise DataError(f"{path} has no split {split!r}: it is one set of rows", hint="remove data.split")
        return _files_of(path), label
    splits = _read(path / _SPLITS).get("splits")
    if not isinstance(splits, list) or split not in splits:
        names = [str(name) for name in splits] if isinstance(splits, list) else []
        hint = f"set data.split={names[0]}" if names else "save it again with save_to_disk"
        raise DataError(f"{path} has no split {split!r}; its splits: {shown(names)}", hint=hint)
    return _files_of(path / split), f"{label}[{split}]"


def _files_of(folder: Path) -> list[Path]:
    state = _read(folder / _SET)
    files, indices = state.get("_data_files"), state.get("_indices_data_files")
    names = [str(item.get("filename")) for item in files if isinstance(item, dict)] if isinstance(files, list) else []
    if not names or indices or any(Path(name).name != name for name in names):
        raise DataError(f"{folder / _SET} does not name the Arrow files next to it", hint=_AGAIN)
    return [folder / name for name in names]


_AGAIN = "save it again: datasets.load_from_disk(OLD).save_to_disk(NEW)"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path} is missing or is not a JSON object", hint=_AGAIN)
    return value
