"""Merged: base + adapter as a plain Hugging Face directory in 16 or 32 bits, for transformers, vLLM and KerasHub."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gemma_tune.exporting.export_settings import MergeDtype
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.formats.format import ExportTask, Facts, Format
from gemma_tune.exporting.merge.merge_plan import STORED_DTYPE_OF
from gemma_tune.exporting.verify.forms import PLAIN, Form
from gemma_tune.exporting.verify.parity import LIMITS
from gemma_tune.exporting.verify.runner import Runner, transformers_runner
from gemma_tune.exporting.verify.weight_check import check_merged_weights
from gemma_tune.models.safetensors import BYTES_OF_DTYPE, CONFIG_FILE, stored_tensors
from gemma_tune.reporting.card import CardFormat

# Of a Hugging Face directory; one file, or several with their index.
MODEL_FILES = (
    re.compile(re.escape(CONFIG_FILE)),
    re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", re.ASCII),
)
# The coarsest dtype of the weights decides, the first that is found.
_LIMITS_OF_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


def _estimate_bytes(source: ExportSource, dtype: MergeDtype) -> int:
    """Bytes of the tensors, from the headers of the base."""
    size = None if dtype == "auto" else BYTES_OF_DTYPE[STORED_DTYPE_OF[dtype]]
    tensors = stored_tensors(source.base.directory).values()
    return sum(tensor.num_elements * (size or BYTES_OF_DTYPE[tensor.dtype]) for tensor in tensors)


def _write(task: ExportTask) -> Facts:
    from gemma_tune.exporting.merge.write import merge_adapter

    source = task.source
    return merge_adapter(
        source.base.directory,
        source.adapter,
        task.output,
        settings=task.settings,
        on_progress=task.progress("merged"),
        more_texts=task.texts,
    )


def _runner(directory: Path, source: ExportSource, siblings: Mapping[str, Path]) -> Runner:
    found = {tensor.dtype for tensor in stored_tensors(directory).values()}
    limits = next(LIMITS[name] for dtype, name in _LIMITS_OF_DTYPE.items() if dtype in found)
    check = partial(check_merged_weights, source.base.directory, source.adapter, directory)
    return transformers_runner(Form(FORMAT.name, PLAIN, directory, tokenizer=directory), limits, check=check)


FORMAT = Format(
    name="merged-16bit",
    about="a Hugging Face directory, for transformers, vLLM and KerasHub",
    card=CardFormat(
        about="the whole model: the adapter is merged into the base's 16-bit weights",
        usage="use_merged.md.j2",
        library="transformers",
    ),
    files=MODEL_FILES,
    estimate_bytes=_estimate_bytes,
    write=_write,
    runner=_runner,
    settings=("dtype", "max_shard_bytes"),
)
