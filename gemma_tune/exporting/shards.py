"""The weight files of an output directory: their names, and the index that says which tensor is in which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma_tune.models.files import INDEX_FILE, WEIGHTS_FILE, read_header
from gemma_tune.runs.record import write_json


def shard_names(count: int) -> list[str]:
    """File names as transformers gives and expects them."""
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(directory: Path, names: Sequence[str]) -> int:
    """Write the index where there are several files, from the headers of all; returns the bytes of their tensors."""
    headers = {name: read_header(directory / name) for name in names}
    total_bytes = sum(tensor.num_bytes for header in headers.values() for tensor in header.values())
    if len(names) > 1:
        weight_map = {tensor: name for name, header in headers.items() for tensor in header}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)
    return total_bytes
