"""Reads and encodes weights block by block in numpy: no tensor is ever whole in memory."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_tune.errors import ExportError
from gemma_tune.models.safetensors import StoredTensor

Array = npt.NDArray[np.generic]

# What a block of a stored dtype is read as. numpy has no bfloat16: its bits are the upper half of a float32's.
_NUMPY_DTYPE: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
STORED_DTYPES = tuple(_NUMPY_DTYPE)
# As unsigned integers: all bits but the sign, and those of infinity; what is larger is a NaN.
_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}
# The largest absolute value that each type can hold. A Q8_0 block of 32 holds a float16 scale of 127 steps.
_LARGEST = {
    "F32": float(np.finfo(np.float32).max),
    "F16": 65504.0,
    "BF16": float(np.array([0x7F7F_0000], np.uint32).view(np.float32)[0]),
    "Q8_0": 127 * 65504.0,
}
_COMPARE_ELEMENTS = 1 << 18


def read_block(tensor: StoredTensor, begin: int, end: int) -> Array:
    """Elements [begin, end) of a stored tensor, flat, by plain reads: mapped pages would count as resident memory."""
    values = np.empty(end - begin, _NUMPY_DTYPE[tensor.dtype])
    view = values.data.cast("B")
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset_bytes + begin * values.itemsize)
        while view:
            count = file.readinto(view)
            if not count:
                raise ExportError(f"{tensor.file} ended while it was read", hint="is another program writing it?")
            view = view[count:]
    return values


def encode_block(values: Array, tensor: StoredTensor, to: str, *, add_one: bool) -> Array:
    """Encode what `read_block` gave, whole rows of `tensor`, as ggml type `to`, one added in float32 first if asked.

    Raises ExportError on NaN, infinity, and what the type cannot hold.
    """
    if to == tensor.dtype and not add_one:
        unsigned, all_but_sign, infinity = _BITS[to]
        if (values.view(unsigned) & unsigned(all_but_sign)).max(initial=0) >= infinity:
            raise _not_finite(tensor)
        return values
    wide = _to_float32(values, tensor.dtype)
    if add_one:
        wide += np.float32(1)
    largest = max(wide.max(initial=0), -wide.min(initial=0))
    if not largest < np.inf:
        raise _not_finite(tensor)
    if largest > _LARGEST[to]:
        raise ExportError(
            f"{tensor.name}: a value of {largest:g} is beyond the range of {to.lower()} ({_LARGEST[to]:g})",
            hint="export bf16 or f32; bf16 has float32's range",
        )
    if to == "F32":
        return wide
    if to == "F16":
        return wide.astype(np.float16)
    import gguf

    return gguf.quants.quantize(wide.reshape(-1, tensor.shape[-1]), gguf.GGMLQuantizationType[to])


def _to_float32(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def _not_finite(tensor: StoredTensor) -> ExportError:
    return ExportError(f"{tensor.file}: NaN or infinity in {tensor.name}", hint="the model is damaged; merge it again")


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same values in the same dtype."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    for begin in range(0, a.num_elements, _COMPARE_ELEMENTS):
        end = min(begin + _COMPARE_ELEMENTS, a.num_elements)
        if not np.array_equal(read_block(a, begin, end), read_block(b, begin, end)):
            return False
    return True
