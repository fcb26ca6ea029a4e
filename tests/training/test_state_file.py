"""A tree of tensors and plain values comes back equal, bits and key types included, and nothing else can be stored."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_tune.errors import RunError
from gemma_tune.training.state_file import random_state, read_state, restore_random_state, state_bytes, write_state

TREE: dict[str, Any] = {
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "param_groups": [{"betas": (0.9, 0.999), "fused": None}],
    },
    "eight_bits": {"state1": torch.arange(7, dtype=torch.uint8), "nested": {"absmax": torch.rand(3)}},
    "half": torch.rand(2, 3).bfloat16(),
    "view": torch.rand(4, 6).T[1:3],
    "numbers": [1, 0.1, math.inf, True, None, "text", 2**80],
    "empty": ({}, [], ()),
}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_state(tmp_path, "state", TREE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert equal(read_state(tmp_path, "state"), TREE)


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    weight = torch.rand(3)
    write_state(tmp_path, "state", {"a": weight, "b": weight[1:]})
    assert equal(read_state(tmp_path, "state"), {"a": weight, "b": weight[1:]})


def test_bytes_are_those_of_the_tensors() -> None:
    assert state_bytes({"a": torch.zeros(3), "b": [torch.zeros(5, dtype=torch.uint8)], "c": 7}) == 17


def test_other_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no place for state\.x\.0, a complex"):
        write_state(tmp_path, "state", {"x": [1j]})


@pytest.mark.parametrize("content", [b"", b"{", b"[1", b'{"dict": [["a", {"tensor": "gone"}]]}', b"\x80\x04."])
def test_what_cannot_be_read_is_told(tmp_path: Path, content: bytes) -> None:
    write_state(tmp_path, "state", {"a": torch.zeros(2)})
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(RunError, match=r"the state 'state' cannot be read"):
        read_state(tmp_path, "state")


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), float(np.random.normal()), float(torch.rand(1)), random.random()

    draw()
    write_state(tmp_path, "state", random_state())
    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    restore_random_state(read_state(tmp_path, "state"))
    assert [draw() for _ in range(3)] == expected
