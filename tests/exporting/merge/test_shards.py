"""The oracle of an index is transformers' own: huggingface_hub names and divides the files of save_pretrained."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from gemma_tune.exporting.merge.shards import set_length, shard_names, write_index


@pytest.mark.parametrize("count", [1, 3])
def test_names_and_index_are_those_of_the_hub(count: int, tmp_path: Path) -> None:
    state = {f"layer.{number}": torch.full((10,), float(number)) for number in range(count)}
    plan = split_torch_state_dict_into_shards(state, max_shard_size=40, filename_pattern="model{suffix}.safetensors")
    assert shard_names(count) == sorted(plan.filename_to_tensors)
    for name, tensors in plan.filename_to_tensors.items():
        save_file({tensor: state[tensor] for tensor in tensors}, tmp_path / name)
    assert write_index(tmp_path, shard_names(count)) == 40 * count
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() is (count > 1) is plan.is_sharded
    if count > 1:
        written = json.loads(index.read_text(encoding="utf-8"))
        assert written["weight_map"] == plan.tensor_to_filename and written["metadata"]["total_size"] == 40 * count


def test_a_file_gets_its_length_and_its_blocks(tmp_path: Path) -> None:
    """The oracle of the blocks is util-linux's fallocate, where the file system knows them."""
    path, other = tmp_path / "file", tmp_path / "other"
    with path.open("wb") as file:
        file.write(b"header")
        set_length(file, 1_000_000)
    assert path.read_bytes() == b"header" + bytes(999_994)
    if shutil.which("fallocate"):
        made = subprocess.run(["fallocate", "--length", "1000000", str(other)], capture_output=True, check=False)
        assert made.returncode or path.stat().st_blocks == other.stat().st_blocks > 0
