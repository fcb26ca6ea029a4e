"""LEAF. Stored tensors into torch and back, by plain reads and writes: mapped pages would count as resident memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch

from gemma_tune.errors import ExportError
from gemma_tune.models.safetensors import BYTES_OF_DTYPE, StoredTensor

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# 1 MiB in float32. Reads and writes of up to 1 MiB ran at 4.4 GB/s, as fast as a copy inside the kernel; those of 4 MiB
# at 0.4 to 0.8 GB/s (1.5 GB, ext4, 2 cores). Smaller blocks pay for Python.
BLOCK_ELEMENTS = 1 << 18
MAX_WORKERS = 4  # threads that work on blocks


def read_elements(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) of a stored tensor, flat."""
    values = torch.empty(end - begin, dtype=TORCH_DTYPE[tensor.dtype])
    with FileIO(tensor.file) as file:
        read_into(file, values, offset_bytes=tensor.offset_bytes + begin * BYTES_OF_DTYPE[tensor.dtype])
    return values


def read_into(file: FileIO, values: torch.Tensor, *, offset_bytes: int) -> None:
    """Fill a flat tensor with the bytes at a place of an open file."""
    file.seek(offset_bytes)
    view = _bytes_of(values)
    while view:
        count = file.readinto(view)
        if not count:
            raise ExportError(f"{file.name} ended while it was read", hint="is another program writing it?")
        view = view[count:]


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """A whole stored tensor, in its shape."""
    return read_elements(tensor, 0, tensor.num_elements).view(tensor.shape)


def write_elements(values: torch.Tensor, path: Path, *, offset_bytes: int) -> None:
    """Write a contiguous tensor's bytes at a place of an existing file."""
    with FileIO(path, "r+") as file:
        write_into(file, values, offset_bytes=offset_bytes)


def write_into(file: FileIO, values: torch.Tensor, *, offset_bytes: int) -> None:
    """Write a contiguous tensor's bytes at a place of an open file."""
    file.seek(offset_bytes)
    view = _bytes_of(values)
    while view:
        view = view[file.write(view) :]


def _bytes_of(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(-1).view(torch.uint8).numpy())


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity.

    Either makes a sum NaN or infinite, and a sum takes 11 us a block of bfloat16, aminmax 27, isfinite().all() 570. A
    sum can also overflow without them: only then every value is looked at.
    """
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def same_values(a: StoredTensor, b: StoredTensor, transposed: bool) -> bool:
    """Whether b holds a's values (those of a.T when transposed) after rounding a to b's dtype."""
    if transposed:
        return a.shape == b.shape[::-1] and torch.equal(read_tensor(a).T.to(TORCH_DTYPE[b.dtype]), read_tensor(b))
    if a.shape != b.shape:
        return False
    for begin in range(0, a.num_elements, BLOCK_ELEMENTS):
        end = min(begin + BLOCK_ELEMENTS, a.num_elements)
        if not torch.equal(read_elements(a, begin, end).to(TORCH_DTYPE[b.dtype]), read_elements(b, begin, end)):
            return False
    return True


@contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """The workers are the parallelism: threads inside torch's operations on such small blocks would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
