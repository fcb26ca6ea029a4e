"""Rows of a dataset on the hub, through `datasets` and its cache."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

from gemma_tune.data.sources.arrow_rows import BATCH_ROWS, arrow_rows
from gemma_tune.data.sources.items import SourceItem, SourceRow
from gemma_tune.errors import DataError


def load_hub_rows(
    source: str, *, label: str, subset: str | None, split: str, revision: str | None
) -> Callable[[], Iterator[SourceItem]]:
    """Load a hub dataset, called `label` in messages; what is returned starts a pass over its rows, read in batches.

    Raises a DataError where it cannot be loaded.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(source, name=subset, split=split, revision=revision)
    except Exception as error:
        # load_dataset lets through whatever the hub client, the network stack and the file readers raise.
        raise _hub_error(error, source=source, subset=subset, split=split, revision=revision) from error
    tables = loaded.with_format("arrow")
    return lambda: arrow_rows(tables.iter(batch_size=BATCH_ROWS), lambda index: f"{label}:{index}")


def hash_rows(items: Iterable[SourceItem]) -> str:
    """The sha256 of the rows as JSON."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, SourceRow):
            digest.update(json.dumps(item.fields, sort_keys=True, default=str).encode("utf-8"))
    return digest.hexdigest()


def _hub_error(error: Exception, *, source: str, subset: str | None, split: str, revision: str | None) -> DataError:
    """What went wrong on the hub, with the next step."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    what = f"cannot load the hub dataset {source}"
    if "gated" in said.lower():
        return DataError(
            f"{what}: it is gated",
            hint=f"accept its terms at https://huggingface.co/datasets/{source}, then: hf auth login",
        )
    if "DatasetNotFoundError" in kinds:
        at = f" at revision {revision}" if revision else ""
        return DataError(
            f"{what}: not found{at}",
            hint="check the name; for a private one: hf auth login; for a file of your own, check its path",
        )
    if kinds & {
        "ConnectionError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "TimeoutException",
        "LocalEntryNotFoundError",
    }:
        return DataError(
            f"{what}: the hub cannot be reached ({said})",
            hint="connect once to fill the cache, or give a local .jsonl/.csv/.parquet file",
        )
    if isinstance(error, ValueError) and ("split" in said.lower() or "config" in said.lower()):
        given = f"data.subset={subset or 'null'}, data.split={split}"
        return DataError(
            f"{what}: {said}",
            hint=f"given: {given}; its page lists subsets and splits: https://huggingface.co/datasets/{source}",
        )
    return DataError(f"{what}: {said}", hint="download it as a .parquet or .jsonl file and give that as data.source")
