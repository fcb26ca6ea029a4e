"""Rows from files, from the hub or from the package, each with the place it came from."""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from gemma_tune.data.sources.files import find_file, is_row_file, known_kinds, near_hint, read_rows
from gemma_tune.data.sources.hub_rows import hash_rows, load_hub_rows
from gemma_tune.data.sources.items import BrokenLine, RowFile, SourceItem, SourceNote, SourceRow, shown, stop_if_broken
from gemma_tune.data.sources.saved_datasets import is_saved_dataset, saved_files
from gemma_tune.errors import DataError
from gemma_tune.paths import TINY_ROWS_DIR

TINY_WORLD = "tiny-world"
TINY_SPLITS = ("train", "eval")
MAX_COLUMN_ROWS = 1_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WILDCARD = re.compile(r"[*?[]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Source:
    """A source of rows that was found and holds something."""

    label: str  # the source as messages call it: `rows.jsonl`, `rows-*.jsonl (3 files)`, `owner/name[train]`
    sha256: str  # of the file's bytes; of several files' names and hashes; of a hub dataset's rows as JSON
    columns: tuple[str, ...]  # of the first 1,000 rows, in the order of first appearance
    notes: tuple[str, ...]  # what is to be said once of the whole, such as a column that is not read
    _read: Callable[[], Iterator[SourceItem]] = field(repr=False, compare=False)

    def rows(self) -> Iterator[SourceRow | BrokenLine]:
        """Every row and every piece that is none, in order; each call starts from the beginning.

        Raises:
            DataError: a file turns out not to be whole, or was changed since the source was opened.
        """
        return (item for item in self._read() if not isinstance(item, SourceNote))

    def head(self, count: int) -> Self:
        """The first `count` rows and broken pieces as a source."""
        return replace(self, _read=lambda: itertools.islice(self.rows(), count))


def open_source(source: str, *, subset: str | None = None, split: str = "train", revision: str | None = None) -> Source:
    """Find `source`: a file, a pattern of files (`data/part-*.jsonl`; `**` too), a folder that `save_to_disk` wrote, a
    hub id `owner/name` or `tiny-world`.

    Files are of a kind of `known_kinds()`, text in UTF-8 with or without BOM. `subset` and `revision` belong to hub
    datasets, a `split` other than train to those, to saved folders and to tiny-world (train and eval).

    Raises:
        DataError: the source is missing, unreadable, empty, or not what its name says.
    """
    if source == TINY_WORLD:
        if split not in TINY_SPLITS:
            raise DataError(f"{TINY_WORLD} has no split {split!r}", hint=f"its splits: {', '.join(TINY_SPLITS)}")
        _refuse_hub_settings(source, subset=subset, split="train", revision=revision)
        return _open_files([find_file(TINY_ROWS_DIR / f"{split}.jsonl")], label=f"{TINY_WORLD}[{split}]")
    if _URL.match(source):
        raise DataError(f"{source} is a web address", hint="download it and give the file, or a hub id owner/name")
    if is_local(source):
        path = Path(os.path.expanduser(source))
        is_saved = is_saved_dataset(path)
        _refuse_hub_settings(source, subset=subset, split="train" if is_saved else split, revision=revision)
        if is_saved:
            files, label = saved_files(path, split=split)
            named = [(file, f"{path.resolve().name}/{file.relative_to(path).as_posix()}") for file in files]
            return _open_files([find_file(file, name=name) for file, name in named], label=label)
        if _WILDCARD.search(source) and not os.path.exists(path):
            return _open_pattern(path)
        return _open_files([find_file(path)], label=path.name)
    if _HUB_ID.fullmatch(source):
        label = f"{source}[{split}]"
        read = load_hub_rows(source, label=label, subset=subset, split=split, revision=revision)
        return _made(label, sha256=hash_rows(read()), read=read)
    raise DataError(
        f"no such data source: {source}", hint=f"give a file ({known_kinds()}), a hub id owner/name, or {TINY_WORLD}"
    )


def is_local(source: str) -> bool:
    """Whether a source names files of this machine, which need not exist: a file of rows, a directory or a pattern."""
    # os.path, not pathlib: it raises neither for a home that is unknown nor for a name that is too long.
    path = os.path.expanduser(source)
    return source != TINY_WORLD and (is_row_file(Path(path)) or os.path.exists(path) or bool(_WILDCARD.search(source)))


def split_count(source: str) -> tuple[str, int | None]:
    """`rows.jsonl#500` → (`rows.jsonl`, 500); a name that is one of rows itself, such as `rows#5.jsonl`, is not split.

    Raises:
        DataError: what follows the last # is not a number above 0.
    """
    name, mark, count = source.rpartition("#")
    if not mark or is_row_file(Path(source)) or os.path.isdir(os.path.expanduser(source)):
        return source, None
    if not count.isdecimal() or int(count) == 0:
        raise DataError(
            f"{source}: #{count} is not a number of rows", hint=f"write {name}#500 for 500 train rows of it"
        )
    return name, int(count)


def read_whole(source: Source) -> list[SourceRow]:
    """Read every row of a source into memory; raises a DataError where a line of it is no row."""
    items = list(source.rows())
    stop_if_broken([item for item in items if isinstance(item, BrokenLine)])
    return [item for item in items if isinstance(item, SourceRow)]


def _refuse_hub_settings(source: str, *, subset: str | None, split: str, revision: str | None) -> None:
    given = [name for name, value in (("subset", subset), ("revision", revision)) if value is not None]
    given += ["split"] if split != "train" else []
    if given:
        names = " and ".join(f"data.{name}" for name in given)
        raise DataError(f"{source} has no {' or '.join(given)}", hint=f"remove {names}: they belong to a hub dataset")


def _made(label: str, *, sha256: str, read: Callable[[], Iterator[SourceItem]]) -> Source:
    """The source with its columns, once it is known to hold something."""
    columns: dict[str, None] = {}
    notes: list[str] = []
    is_empty, num_rows = True, 0
    for item in read():
        if isinstance(item, SourceNote):
            notes.append(item.text)
            continue
        is_empty = False
        if isinstance(item, SourceRow):
            columns.update(dict.fromkeys(item.fields))
            num_rows += 1
        if num_rows == MAX_COLUMN_ROWS:
            break
    if is_empty:
        raise DataError(f"{label} is empty: it holds no rows", hint="it needs at least one row")
    return Source(label=label, sha256=sha256, columns=tuple(columns), notes=tuple(notes), _read=read)


def _open_files(files: Sequence[RowFile], *, label: str) -> Source:
    def read() -> Iterator[SourceItem]:
        for file in files:
            yield from read_rows(file)

    if len(files) == 1:
        return _made(label, sha256=files[0].sha256, read=read)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.sha256}  {file.name}\n".encode("utf-8", errors="surrogateescape"))
    return _made(label, sha256=digest.hexdigest(), read=read)


def _open_pattern(pattern: Path) -> Source:
    """The files that match `pattern`, as one source; one alone counts as that file."""
    depth = next(index for index, part in enumerate(pattern.parts) if _WILDCARD.search(part))
    base = Path(*pattern.parts[:depth])
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if os.path.isfile(name))
    if not found:
        raise _no_match_error(pattern, base)
    unknown = [path.name for path in found if not is_row_file(path)]
    if unknown:
        raise DataError(
            f"{pattern} matches files of an unknown kind: {shown(unknown)}", hint=f"narrow it; known: {known_kinds()}"
        )
    # Below the part without wildcards the names differ from each other, which the last parts alone need not.
    files = [find_file(path, name=path.relative_to(base).as_posix()) for path in found]
    if len(files) == 1:
        return _open_files(files, label=files[0].name)
    return _open_files(files, label=f"{pattern.relative_to(base).as_posix()} ({len(files):,} files)")


def _no_match_error(pattern: Path, base: Path) -> DataError:
    if not base.is_dir():
        return DataError(f"no file matches {pattern}: there is no directory {base}", hint=near_hint(base))
    children = sorted(base.iterdir())
    names = [path.name for path in children if is_row_file(path)]
    names = names or [f"{path.name}/" if path.is_dir() else path.name for path in children]
    return DataError(f"no file matches {pattern}", hint=f"in {base}: {shown(names) if names else 'nothing'}")
