"""How many rows a recipe trains on and how long they are, without a tokenizer or a download."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tune.data.sources.source import TINY_WORLD
from gemma_tune.paths import TINY_ROWS_DIR
from gemma_tune.recipe.schema import DataSection

# Bytes of UTF-8 text a token of Gemma's 256,000-entry vocabulary: English prose. Other languages and code differ.
_BYTES_PER_TOKEN = 4.2
# A row of JSON has its keys, quotes and escapes next to its text.
_TEXT_SHARE = 0.9
_MAX_JSON_BYTES = 64 * 2**20


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
        parts = [count_rows(part.source) for part in data.mix]
        if any(part.rows is None or part.mean_tokens is None for part in parts):
            return _NOT_KNOWN
        rows = sum(part.rows or 0 for part in parts)
        tokens = sum((part.rows or 0) * (part.mean_tokens or 0) for part in parts)
        counted = RowCount(rows, tokens / rows, "all rows of the mix; weights leave some out")
    else:
        name, _, wanted = data.source.partition("#")
        is_tiny = name == TINY_WORLD
        counted = count_rows(
            f"{TINY_ROWS_DIR / 'train.jsonl'}{data.source.removeprefix(name)}" if is_tiny else data.source
        )
        limit = data.max_train_rows
        if counted.rows is not None and limit is not None and limit < counted.rows:
            counted = RowCount(limit, counted.mean_tokens, "data.max_train_rows")
        if is_tiny or limit is not None or wanted:
            return counted
    if counted.rows is None or data.eval_source or data.eval_split or data.max_train_rows is not None:
        return counted
    return replace(counted, rows=max(counted.rows - math.floor(counted.rows * data.eval_fraction), 1))


def count_rows(source: str) -> RowCount:
    """Count rows and mean tokens of a source (with its `#N`): from a local file, or from published figures."""
    name, _, wanted = source.partition("#")
    path = Path(name)
    if name.lower() in PUBLISHED_ROWS:
        rows, size = PUBLISHED_ROWS[name.lower()]
        counted = RowCount(rows, _mean_tokens(size, rows), "the dataset's page")
    elif path.is_file() and path.suffix.lower() in (".jsonl", ".csv", ".tsv", ".json"):
        counted = _count_file(path)
    else:
        counted = _NOT_KNOWN
    return RowCount(int(wanted), counted.mean_tokens, f"{name}#{wanted}") if wanted.isdigit() else counted


def _count_file(path: Path) -> RowCount:
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix == ".json":
        if size > _MAX_JSON_BYTES:
            return _NOT_KNOWN
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return _NOT_KNOWN
        rows = len(content) if isinstance(content, list) else 0
    else:
        with path.open("rb") as file:
            rows = sum(1 for line in file if line.strip()) - (suffix != ".jsonl")
    if rows < 1:
        return _NOT_KNOWN
    return RowCount(rows, _mean_tokens(size, rows), f"{path.name}: lines and bytes")


def _mean_tokens(size: int, rows: int) -> float:
    return size * _TEXT_SHARE / rows / _BYTES_PER_TOKEN
