"""The merged model in 4 bits (bitsandbytes NF4), which loads without quantizing again."""

from collections.abc import Mapping
from pathlib import Path

from gemma_tune.exporting.export_settings import MergeDtype
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.formats import merged
from gemma_tune.exporting.formats.format import ExportTask, Facts, Format
from gemma_tune.exporting.verify.forms import PLAIN, Form
from gemma_tune.exporting.verify.parity import LIMITS
from gemma_tune.exporting.verify.runner import Runner, transformers_runner
from gemma_tune.models.safetensors import stored_tensors
from gemma_tune.reporting.card import CardFormat

# Double quantization; what a shard adds is in the writer's own check.
_BYTES_OF_NF4 = 0.53


def _estimate_bytes(source: ExportSource, dtype: MergeDtype) -> int:
    tensors = stored_tensors(source.base.directory).values()
    return int(sum(t.num_elements * _BYTES_OF_NF4 if t.name.endswith("_proj.weight") else t.num_bytes for t in tensors))


def _write(task: ExportTask) -> Facts:
    from gemma_tune.exporting.merge.quantize_nf4 import quantize_merged

    return quantize_merged(
        task.made_from,
        task.output,
        max_shard_bytes=task.settings.max_shard_bytes,
        on_progress=task.progress("quantised"),
        more_texts=task.texts,
    )


def _runner(directory: Path, source: ExportSource, siblings: Mapping[str, Path]) -> Runner:
    form = Form(FORMAT.name, PLAIN, directory, tokenizer=directory)
    return transformers_runner(form, LIMITS["4bits"], against_trained=True)


FORMAT = Format(
    name="merged-4bit",
    about="the same in NF4 (bitsandbytes)",
    card=CardFormat(
        about="the whole model, merged in 16 bits and then quantized to bitsandbytes NF4",
        usage="use_merged.md.j2",
        library="transformers",
        tags=("bitsandbytes", "4-bit"),
        is_quantized=True,
    ),
    files=merged.MODEL_FILES,
    estimate_bytes=_estimate_bytes,
    write=_write,
    runner=_runner,
    parent=lambda source, asked, dtype: merged.FORMAT.name,
    settings=("dtype", "max_shard_bytes"),
)
