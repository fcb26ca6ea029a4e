"""The weight files of an output directory: what goes into which, names, headers, room on the disk, and the index."""

import ctypes
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from gemma_tune.disk import write_json
from gemma_tune.models.safetensors import INDEX_FILE, WEIGHTS_FILE, read_header


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Sized = TypeVar("Sized", bound=_Sized)


def fill_shards(
    groups: Iterable[Sequence[Sized]], max_shard_bytes: int, *, key: Callable[[Sized], Any]
) -> tuple[tuple[Sized, ...], ...]:
    """Fill files in order up to the limit; a group stays together, and a larger one has a file of its own.

    Args:
        key: sorts the tensors of a file: wider dtypes first, so that each is aligned to its element size.
    """
    shards: list[list[Sized]] = [[]]
    filled = 0
    for group in groups:
        num_bytes = sum(tensor.num_bytes for tensor in group)
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += num_bytes
    return tuple(tuple(sorted(shard, key=key)) for shard in shards)


def format_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the JSON of a safetensors header, from (name, dtype, shape, bytes) of the tensors in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, num_bytes in tensors:
        begin, end = end, end + num_bytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(entries, separators=(",", ":")).encode("utf-8")


def shard_names(count: int) -> list[str]:
    """File names as transformers gives and expects them."""
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def set_length(file: BinaryIO, num_bytes: int) -> None:
    """Give a new file its length and, where the system can, its blocks on the disk.

    512 KB are written in 70 us into blocks that have their place, in 100 into new ones; where two threads write into
    one file, in 80 and 170 us of each (ext4, Linux 6.18).
    """
    file.truncate(num_bytes)
    if sys.platform == "linux":
        # Where a file system cannot, os.posix_fallocate writes a byte into every 4 KB: we do without.
        ctypes.CDLL(None).fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))


def write_index(directory: Path, names: Sequence[str]) -> int:
    """Write the index where there are several files, from the headers of all; returns the bytes of their tensors."""
    headers = {name: read_header(directory / name) for name in names}
    total_bytes = sum(tensor.num_bytes for header in headers.values() for tensor in header.values())
    if len(names) > 1:
        weight_map = {tensor: name for name, header in headers.items() for tensor in header}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)
    return total_bytes
