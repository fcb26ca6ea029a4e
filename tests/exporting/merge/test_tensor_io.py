"""The oracle is the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import ExportError
from gemma_tune.exporting.merge.tensor_io import is_finite, read_elements, read_tensor, same_values, write_elements
from gemma_tune.models.safetensors import StoredTensor, read_header

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def stored(path: Path, **tensors: torch.Tensor) -> dict[str, StoredTensor]:
    save_file(tensors, path)
    return read_header(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_writes_what_safetensors_does(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    values = (torch.arange(24) % 7).to(dtype).view(4, 6)
    tensor = stored(path, other=torch.ones(3), values=values)["values"]
    assert torch.equal(read_tensor(tensor), values) and read_tensor(tensor).dtype == dtype
    assert torch.equal(read_elements(tensor, 5, 17), values.view(-1)[5:17])
    write_elements(values.flip(0), path, offset_bytes=tensor.offset_bytes)
    assert torch.equal(load_file(path)["values"], values.flip(0))
    assert torch.equal(load_file(path)["other"], torch.ones(3))


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensor = stored(path, values=torch.ones(100))["values"]
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 40)
    with pytest.raises(ExportError, match="ended while it was read"):
        read_tensor(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_finite_values(dtype: torch.dtype) -> None:
    """The oracle is torch.isfinite. The largest values of a dtype sum up to infinity, opposite infinities to NaN."""
    largest, infinity = torch.finfo(dtype).max, float("inf")
    for some in ([], [1.0], [largest, largest], [-largest] * 40, [float("nan")], [infinity, -infinity], [-infinity]):
        values = torch.tensor(some * 100, dtype=dtype)
        assert is_finite(values) is bool(values.isfinite().all()), some


def test_same_values(tmp_path: Path) -> None:
    values = torch.randn(5, 3)
    tensors = stored(
        tmp_path / "a.safetensors", a=values, same=values.clone(), rounded=values.bfloat16(),
        transposed=values.T.contiguous(), other=values + 1, flat=values.reshape(-1).clone(),
    )  # fmt: skip
    a = tensors["a"]
    assert same_values(a, tensors["same"], False) and same_values(a, tensors["rounded"], False)
    assert same_values(a, tensors["transposed"], True) and not same_values(a, tensors["same"], True)
    assert not same_values(a, tensors["other"], False) and not same_values(a, tensors["flat"], False)
