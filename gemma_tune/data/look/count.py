"""How many rows a recipe trains on and how long they are, without a tokenizer or a download."""

import functools
import glob
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tune.data.sources.files import LINE_KINDS, read_beginning
from gemma_tune.data.sources.items import BrokenLine, SourceRow, stop_if_broken
from gemma_tune.data.sources.source import TINY_WORLD, is_local, open_source, split_count
from gemma_tune.identity import file_stamp
from gemma_tune.paths import TINY_ROWS_DIR
from gemma_tune.recipe.schema import DataSection
from gemma_tune.text import format_bytes

# Bytes of UTF-8 text a token of Gemma's 256,000-entry vocabulary: English prose. Other languages and code differ.
_BYTES_PER_TOKEN = 4.2
# A row of JSON has its keys, quotes and escapes next to its text.
_TEXT_SHARE = 0.9
# Reading takes a second or two for so many bytes.
MAX_COUNTED_BYTES = 256 * 2**20
SAMPLE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class RowCount:
    """Rows of a source, their mean length in tokens, and where both come from. None: not known without a download."""

    rows: int | None
    mean_tokens: float | None
    source: str


_NOT_KNOWN = RowCount(None, None, "not known before the data is read")
# Rows and bytes of the jsonl file, as the dataset's page on the hub states them.
PUBLISHED_ROWS = {"databricks/databricks-dolly-15k": (15_011, 13_100_000)}


def count_train_rows(data: DataSection) -> RowCount:
    """Count the rows of a recipe that are trained on: those of its source or mix, less what is held out of them."""
    if data.source is None:
        parts = [count_rows(part.source, split=part.split or data.split) for part in data.mix]
        if any(part.rows is None or part.mean_tokens is None for part in parts):
            return _NOT_KNOWN
        rows = sum(part.rows or 0 for part in parts)
        tokens = sum((part.rows or 0) * (part.mean_tokens or 0) for part in parts)
        counted = RowCount(rows, tokens / rows, "all rows of the mix; weights leave some out")
    else:
        name, wanted = split_count(data.source)
        is_tiny = name == TINY_WORLD
        counted = count_rows(
            f"{TINY_ROWS_DIR / 'train.jsonl'}{data.source.removeprefix(name)}" if is_tiny else data.source,
            split="train" if is_tiny else data.split,
        )
        limit = data.max_train_rows
        if counted.rows is not None and limit is not None and limit < counted.rows:
            counted = RowCount(limit, counted.mean_tokens, "data.max_train_rows")
        if is_tiny or limit is not None or wanted is not None:
            return counted
    if counted.rows is None or data.eval_source or data.eval_split or data.max_train_rows is not None:
        return counted
    return replace(counted, rows=max(counted.rows - math.floor(counted.rows * data.eval_fraction), 1))


def count_rows(source: str, *, split: str = "train") -> RowCount:
    """Count rows and mean tokens of a source (with its `#N`): of what is on this machine, or from published figures.

    Raises:
        DataError: a file is there and cannot be read, in the words that a training has for it.
    """
    name, wanted = split_count(source)
    path = os.path.expanduser(name)
    found = sorted({path} if os.path.exists(path) else glob.iglob(path, recursive=True)) if is_local(name) else []
    if name.lower() in PUBLISHED_ROWS:
        rows, size = PUBLISHED_ROWS[name.lower()]
        counted = RowCount(rows, size * _TEXT_SHARE / rows / _BYTES_PER_TOKEN, "the dataset's page")
    else:
        stamps = tuple((each, *file_stamp(Path(each))) for each in found)
        counted = _count_local(name, split, stamps) if found else _NOT_KNOWN
    return counted if wanted is None else RowCount(wanted, counted.mean_tokens, source)


@functools.lru_cache(maxsize=16)
def _count_local(name: str, split: str, stamps: tuple[tuple[str, int, int], ...]) -> RowCount:
    """Count as the reader reads; of what is larger than MAX_COUNTED_BYTES, its first rows say how many the rest are."""
    size = sum(size for _, size, _ in stamps)
    if size > MAX_COUNTED_BYTES and all(path.lower().endswith(LINE_KINDS) for path, _, _ in stamps):
        items, read_bytes, how = read_beginning(Path(stamps[0][0]), SAMPLE_BYTES), SAMPLE_BYTES, "estimated"
    else:
        items, read_bytes, how = open_source(name, split=split).rows(), size, "counted"
    rows = text_bytes = 0
    broken: list[BrokenLine] = []
    for item in items:
        if isinstance(item, SourceRow):
            rows += 1
            text_bytes += sum(map(_size_of, item.fields.values()))
        elif isinstance(item, BrokenLine):
            broken.append(item)
    if how == "counted":
        stop_if_broken(broken)
    if not rows:
        return _NOT_KNOWN
    told = f"{Path(name).name}: {how}" + ("" if how == "counted" else f" from its first {format_bytes(read_bytes)}")
    return RowCount(round(rows * size / read_bytes), text_bytes / rows / _BYTES_PER_TOKEN, told)


def _size_of(value: object) -> int:
    if value is None:
        return 0
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return len(text) if text.isascii() else len(text.encode("utf-8", errors="surrogatepass"))
