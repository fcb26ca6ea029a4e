"""Writes a merged Gemma as one GGUF file in f32, f16, bf16 or q8_0: the memory needed does not grow with the model.

The `gguf` package writes the header; the weights are read, encoded, checked and written to their known places in blocks
of rows, several at a time. The file is written next to its destination and renamed when it is complete.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from gemma_tune.disk import output_file, refuse_existing, require_free_disk
from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.architecture import GgufArchitecture, add_hyperparameters, read_architecture
from gemma_tune.exporting.gguf.blocks import encode_block, read_block
from gemma_tune.exporting.gguf.header import GgufHeader, align, read_gguf_header, summarize_gguf
from gemma_tune.exporting.gguf.quantize import CONVERTED, quantized_bytes, require_gguf_packages
from gemma_tune.exporting.gguf.tensors import GgufDtype, GgufTensor, TensorPlan, plan_tensors
from gemma_tune.exporting.gguf.vocabulary import GgufVocabulary, add_vocabulary, read_vocabulary
from gemma_tune.models.safetensors import stored_tensors

# 1 MiB in float32: as large as merge.py's blocks, which were measured.
_BLOCK_ELEMENTS = 1 << 18
_MAX_WORKERS = 4
# A row of the vocabulary takes 8 + 4 + 4 bytes and its text, 9 bytes in the mean of Gemma's 262,144.
_HEADER_BYTES_PER_ROW = 40
# llama.cpp's `llama_ftype`.
_FILE_TYPE: dict[GgufDtype, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}


@dataclass(frozen=True)
class GgufProvenance:
    """Where the model comes from, as the file's metadata tells it. No path of this machine belongs here."""

    name: str  # what llama.cpp and Ollama show
    license: str = "gemma"  # an id as the hub spells it; the link goes to its text
    license_link: str | None = "https://ai.google.dev/gemma/terms"
    base_model: str | None = None  # the hub id `owner/name` of the base, or its plain name
    base_revision: str | None = None  # the hub's commit of the base


def convert_to_gguf(
    merged_dir: Path,
    output: Path,
    *,
    dtype: GgufDtype,
    provenance: GgufProvenance,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face directory of a Gemma 1, 2 or 3 as a GGUF file, of a multimodal one the text model; returns
    what export.json tells of it.

    `on_progress` gets (bytes done, bytes in all) in the caller's thread. Raises ExportError or ModelError, before
    anything is written unless a weight itself is at fault; then no output is left.
    """
    require_gguf_packages(dtype)
    refuse_existing(output)
    architecture = read_architecture(merged_dir)
    plan = plan_tensors(merged_dir, architecture, dtype)
    require_free_disk(output, _file_bytes(plan), what=f"the {dtype} GGUF")
    vocabulary = read_vocabulary(merged_dir, num_rows=plan.num_rows)
    notes = vocabulary.notes
    with output_file(output) as partial_file:
        data_start = _write_header(
            partial_file, dtype, architecture=architecture, vocabulary=vocabulary, plan=plan, provenance=provenance
        )
        del vocabulary
        _write_tensors(partial_file, plan, data_start, on_progress=on_progress or (lambda done, total: None))
        header = _prove(partial_file, plan, data_start)
    return summarize_gguf(header, notes=(*architecture.notes, *notes, *plan.notes))


def gguf_bytes(merged_dir: Path, quantization: str) -> int:
    """Bytes of disk that an export needs at its peak. A K-quant is made from a 16-bit file, which lies next to it."""
    require_gguf_packages(quantization)
    architecture = read_architecture(merged_dir)
    if quantization in CONVERTED:
        return _file_bytes(plan_tensors(merged_dir, architecture, cast(GgufDtype, quantization)))
    plan = plan_tensors(merged_dir, architecture, lossless_dtype(merged_dir))
    shapes = [(tensor.name, tensor.source.shape) for tensor in plan.tensors]
    return _file_bytes(plan) + quantized_bytes(shapes, quantization) + plan.num_rows * _HEADER_BYTES_PER_ROW


def lossless_dtype(merged_dir: Path) -> GgufDtype:
    """The narrowest dtype that holds every weight as it is stored: the one to quantise from."""
    dtypes = {tensor.dtype for tensor in stored_tensors(merged_dir).values() if len(tensor.shape) > 1}
    return cast(GgufDtype, dtypes.pop().lower()) if len(dtypes) == 1 else "f32"


def _file_bytes(plan: TensorPlan) -> int:
    return plan.num_bytes + plan.num_rows * _HEADER_BYTES_PER_ROW


def _write_header(
    path: Path,
    dtype: GgufDtype,
    *,
    architecture: GgufArchitecture,
    vocabulary: GgufVocabulary,
    plan: TensorPlan,
    provenance: GgufProvenance,
) -> int:
    """Write everything but the weights, and give the file its whole length; returns where the weights begin."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture.facts.architecture)
    _add_provenance(writer, provenance, sum(tensor.source.num_elements for tensor in plan.tensors))
    writer.add_file_type(_FILE_TYPE[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, architecture)
    add_vocabulary(writer, vocabulary)
    for tensor in plan.tensors:
        type_ = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.source.shape, np.dtype(np.float32), tensor.num_bytes, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data_start = align(path.stat().st_size)
    os.truncate(path, data_start + plan.num_bytes)
    return data_start


def _add_provenance(writer: Any, provenance: GgufProvenance, num_params: int) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(provenance.name)
    writer.add_size_label(gguf.size_label(num_params, num_params, 0, 0))
    writer.add_license(provenance.license)
    if provenance.license_link is not None:
        writer.add_license_link(provenance.license_link)
    if provenance.base_model is not None:
        *owners, name = re.split(r"[/\\]", provenance.base_model)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        # More parts, or an empty one, are a path of this machine, of which only the last part may leave it.
        if len(owners) == 1 and owners[0].strip("."):
            writer.add_base_model_organization(0, owners[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{provenance.base_model}")
        if provenance.base_revision is not None:
            writer.add_base_model_version(0, provenance.base_revision)


def _write_tensors(path: Path, plan: TensorPlan, data_start: int, *, on_progress: Callable[[int, int], None]) -> None:
    """Blocks are independent and have fixed places, so the result does not depend on the number of workers."""
    total_bytes, done_bytes = sum(tensor.num_bytes for tensor in plan.tensors), 0
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as workers:
        try:
            for tensor in plan.tensors:
                for num_bytes in workers.map(partial(_write_block, path, data_start, tensor), _blocks(tensor)):
                    done_bytes += num_bytes
                    on_progress(done_bytes, total_bytes)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _blocks(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    """Begin and end of each block of whole rows, in elements."""
    width = tensor.source.shape[-1]
    step = max(width, _BLOCK_ELEMENTS // width * width)
    for begin in range(0, tensor.source.num_elements, step):
        yield begin, min(begin + step, tensor.source.num_elements)


def _write_block(path: Path, data_start: int, tensor: GgufTensor, block: tuple[int, int]) -> int:
    """Read, encode and write one block; returns its bytes in the file."""
    begin, end = block
    values = read_block(tensor.source, begin, end)
    encoded = encode_block(values, tensor.source, tensor.type, add_one=tensor.adds_one).data.cast("B")
    num_bytes = encoded.nbytes
    with path.open("rb+", buffering=0) as file:
        file.seek(data_start + tensor.offset_bytes + begin * tensor.num_bytes // tensor.source.num_elements)
        while encoded:
            encoded = encoded[file.write(encoded) :]
    return num_bytes


def _prove(path: Path, plan: TensorPlan, data_start: int) -> GgufHeader:
    """Read the header back: names, shapes, types and places must be the planned ones."""
    header = read_gguf_header(path)
    planned = [(t.name, t.source.shape, t.type, data_start + t.offset_bytes, t.num_bytes) for t in plan.tensors]
    if [(t.name, t.shape, t.type, t.offset_bytes, t.num_bytes) for t in header.tensors] != planned:
        raise ExportError(f"{path.name} does not hold what was planned", hint="is the disk sound?")
    return header
