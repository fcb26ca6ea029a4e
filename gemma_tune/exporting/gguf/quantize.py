"""Quantises a GGUF file with llama.cpp; and the table of what can be made, with or without it.

llama.cpp ends its process instead of raising, so it works in a process of its own (quantize_worker.py).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import output_file, refuse_existing, require_free_disk
from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.header import GgufHeader, read_gguf_header, summarize_gguf
from gemma_tune.exporting.required_packages import RequiredPackage, require_packages
from gemma_tune.machine.child import run_child
from gemma_tune.paths import read_table
from gemma_tune.text import did_you_mean

# What convert.py writes without a compiled package.
CONVERTED = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class Quantization:
    """One of llama.cpp's mixes."""

    ftype: int  # its number in `llama_ftype`
    bits: float  # a weight's bits in most tensors
    fallback_bits: float  # the same where a row is no multiple of 256 (`tensor_type_fallback` in llama-quant.cpp)


QUANTIZATIONS = {name: Quantization(**row) for name, row in read_table("exporting/gguf/quantizations.toml").items()}
_NEED_IMATRIX = frozenset(
    {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "q2_k_s"}
)
# Tensors that the mixes give up to Q6_K; Q8_0 is what Q6_K falls back to.
_WIDER_TENSORS = ("token_embd.", "output.", "attn_v.", "attn_output.", "ffn_down.")
_WIDER_BITS, _WIDER_FALLBACK_BITS = 6.5625, 8.5
_BLOCK_OF_K_QUANTS, _SMALLEST_BLOCK = 256, 32
_PLAIN_TYPES = {"F32", "F16", "BF16"}
# llama.cpp keeps at most this much of a tensor in memory; its own limit is 8 GiB.
_BUFFER_BYTES = 256 << 20
_LAST_LINES = 6
_GGUF = RequiredPackage("gguf", "gguf", "pip install 'gguf>=0.19,<0.20'")
_LLAMA_CPP = RequiredPackage(
    "llama_cpp",
    "llama-cpp-python",
    "pip install 'gguf>=0.19,<0.20' 'llama-cpp-python==0.3.36' (compiles for about ten minutes), or export q8_0",
)


def refuse_unknown(quantization: str) -> None:
    """Raise ExportError unless `quantization` is one that can be made, naming the nearest."""
    name = quantization.lower()
    if name in _NEED_IMATRIX:
        raise ExportError(
            f"{quantization} needs an importance matrix, which gemma-tune does not measure",
            hint="take q2_k, q3_k_m or q4_k_m instead",
        )
    if quantization not in CONVERTED and quantization not in QUANTIZATIONS:
        known = [*CONVERTED, *(known for known in QUANTIZATIONS if known not in CONVERTED)]
        raise ExportError(
            f"{quantization!r} is no GGUF quantization that gemma-tune knows",
            hint=f"{did_you_mean(name, known)} known: {', '.join(known)}".lstrip(),
        )


def packages_of(quantization: str) -> tuple[RequiredPackage, ...]:
    """The packages that write a GGUF in this quantization from merged weights."""
    return (_GGUF,) if quantization in CONVERTED else (_GGUF, _LLAMA_CPP)


def require_gguf_packages(quantization: str) -> None:
    """Raise ExportError unless `quantization` is one that can be made and its packages are installed."""
    refuse_unknown(quantization)
    require_packages(f"the GGUF quantization {quantization}", packages_of(quantization))


def quantized_bytes(shapes: Iterable[tuple[str, tuple[int, ...]]], quantization: str) -> int:
    """At most this many bytes of weights come out, from the GGUF names and shapes of the tensors."""
    kind = QUANTIZATIONS[quantization]
    bits = 0.0
    for name, shape in shapes:
        num_elements, width = math.prod(shape), shape[-1]
        is_wide = any(part in name for part in _WIDER_TENSORS)
        if len(shape) == 1:
            each = 32.0
        elif width % _SMALLEST_BLOCK:
            each = 16.0
        elif width % _BLOCK_OF_K_QUANTS == 0:
            each = max(kind.bits, _WIDER_BITS if is_wide else 0.0)
        else:
            each = max(kind.fallback_bits, _WIDER_FALLBACK_BITS if is_wide else 0.0)
        bits += num_elements * each
    return int(bits / 8)


def quantize_gguf(
    source: Path, output: Path, *, quantization: str, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Quantise a GGUF file in f32, f16 or bf16 by one of llama.cpp's mixes; returns what export.json tells of it.

    `on_progress` gets (tensors begun, tensors in all) in the caller's thread. Raises ExportError, and then
    no output is left.
    """
    require_gguf_packages(quantization)
    if quantization not in QUANTIZATIONS:
        raise ExportError(f"{quantization} is no quantization", hint="convert_to_gguf writes it from the model itself")
    require_packages(f"llama.cpp's {quantization}", [_LLAMA_CPP])
    refuse_existing(output)
    header = read_gguf_header(source)
    already = sorted({tensor.type for tensor in header.tensors} - _PLAIN_TYPES)
    if already:
        raise ExportError(
            f"{source} is quantised already ({', '.join(already)}); quantising it again would round twice",
            hint="quantise from bf16 or f16",
        )
    shapes = [(tensor.name, tensor.shape) for tensor in header.tensors]
    header_bytes = min(tensor.offset_bytes for tensor in header.tensors)
    needed_bytes = header_bytes + quantized_bytes(shapes, quantization)
    require_free_disk(output, needed_bytes, what=f"the {quantization} GGUF")
    with output_file(output) as partial_file:
        _run_llama_cpp(source, partial_file, quantization, on_progress or (lambda done, total: None))
        quantized = read_gguf_header(partial_file)
        if {(t.name, t.shape) for t in quantized.tensors} != set(shapes):
            raise ExportError(f"{source}: llama.cpp wrote other tensors than it was given", hint="is the disk sound?")
    return summarize_gguf(quantized, notes=_fallback_notes(quantized, quantization))


def _run_llama_cpp(source: Path, output: Path, quantization: str, on_progress: Callable[[int, int], None]) -> None:
    end = run_child(
        "gemma_tune.exporting.gguf.quantize_worker:quantize",
        {
            "source": str(source),
            "output": str(output),
            "ftype": QUANTIZATIONS[quantization].ftype,
            "num_threads": os.cpu_count() or 1,
            "buffer_bytes": _BUFFER_BYTES,
        },
        on_message=lambda message: on_progress(message["done"], message["total"]),
    )
    if end.has_result and end.result == 0:
        return
    how = f"was ended by {end.signal}" if end.signal else f"gave up (code {end.result if end.has_result else end.code})"
    told = "; ".join([*end.last_lines(_LAST_LINES), *filter(None, [end.error])])
    raise ExportError(
        f"{source}: llama.cpp {how} while it made {quantization}" + (f": {told}" if told else ""),
        hint="nothing was kept; is the disk or the memory full? The file it was to be made from is whole",
    )


def _fallback_notes(header: GgufHeader, quantization: str) -> Iterator[str]:
    """Say where a mix is not what its name says: its blocks of 256 do not divide the rows."""
    if QUANTIZATIONS[quantization].bits == QUANTIZATIONS[quantization].fallback_bits:
        return
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) > 1]
    uneven = [tensor for tensor in matrices if tensor.shape[-1] % _BLOCK_OF_K_QUANTS]
    if uneven:
        types = ", ".join(sorted({tensor.type for tensor in uneven}))
        yield (
            f"{len(uneven)} of {len(matrices)} matrices have rows that are no multiple of {_BLOCK_OF_K_QUANTS}: "
            f"llama.cpp wrote them wider than {quantization}, as {types}"
        )
