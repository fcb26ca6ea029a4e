"""Exports an adapter on its own: a directory in PEFT's format that plain PEFT loads, checked against its base.

What leaves is the weights, a config without anything of this machine, the tokenizer and the template that it was
trained with, and the licence; no optimizer state and no pickle. PEFT loads an adapter whose names do not fit with one
warning and no effect; here every tensor finds its module, with the right shape, or nothing is written.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.disk import directory_bytes, output_directory, refuse_existing, require_free_disk, write_json
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import DEFAULT_SETTINGS
from gemma_tune.exporting.export_source import ExportSource, public_name
from gemma_tune.exporting.formats.format import ExportTask, Facts, Format
from gemma_tune.exporting.merge.merge_plan import plan_merge
from gemma_tune.exporting.text_files import licence_files, portable_settings, tokenizer_files, write_text_files
from gemma_tune.exporting.verify.forms import PLAIN, Form
from gemma_tune.exporting.verify.parity import LIMITS
from gemma_tune.exporting.verify.runner import Runner, transformers_runner
from gemma_tune.models.fetch import LocalModel
from gemma_tune.models.safetensors import read_config, stored_tensors
from gemma_tune.reporting.card import CardFormat
from gemma_tune.runs.adapter_dir import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterDir, LoraAdapter
from gemma_tune.runs.adapter_fit import require_fit


def export_adapter(
    adapter_dir: Path, base: LocalModel, output_dir: Path, *, more_texts: Mapping[str, str] | None = None
) -> LoraAdapter:
    """Write the adapter of a run, or any PEFT LoRA adapter, as a directory to give away; returns what was read.

    `more_texts` (name -> content) become files of the output. Raises ExportError or ModelError; then nothing is left.
    """
    refuse_existing(output_dir)
    adapter = AdapterDir(adapter_dir).read_lora()
    check_keys(adapter, base.directory)
    weights = adapter_dir / ADAPTER_WEIGHTS_FILE
    texts = tokenizer_files(base.directory, adapter_dir) | licence_files(base.directory)
    needed_bytes = sum(path.stat().st_size for path in (weights, *texts.values()))
    require_free_disk(output_dir, needed_bytes, what="the adapter")
    with output_directory(output_dir) as partial_dir:
        write_text_files(partial_dir, copied=texts, given=more_texts)
        write_json(partial_dir / ADAPTER_CONFIG_FILE, _config(adapter_dir, base))
        shutil.copyfile(weights, partial_dir / ADAPTER_WEIGHTS_FILE)
        if _facts(AdapterDir(partial_dir).read_lora()) != _facts(adapter):
            raise ExportError(f"{output_dir}: the copy does not read back as the adapter", hint="is the disk sound?")
    return adapter


def check_keys(adapter: LoraAdapter, base_dir: Path) -> None:
    """Refuse an adapter with a tensor that has no module in the base, or another shape. Reads headers only."""
    base, config = stored_tensors(base_dir), read_config(base_dir)
    require_fit(adapter, base, base_config=config)
    if config.get("quantization_config"):
        return
    # A merge checks all of it before it begins; which tensors end up tied does not matter here.
    plan_merge(adapter, base=base, base_config=config, settings=DEFAULT_SETTINGS, same_values=lambda *_: True)


def _config(adapter_dir: Path, base: LocalModel) -> dict[str, Any]:
    config: dict[str, Any] = portable_settings(AdapterDir(adapter_dir).config)
    # PEFT imports the package that auto_mapping names (S2); with a task type it needs none.
    named = {"base_model_name_or_path": public_name(base), "revision": base.revision, "task_type": "CAUSAL_LM"}
    return config | named | {"inference_mode": True}


def _facts(adapter: LoraAdapter) -> object:
    """What must be the same in the copy."""
    tensors = {(tensor.name, tensor.dtype, tensor.shape, tensor.offset_bytes) for tensor in adapter.tensors()}
    return tensors, {module: change.scaling for module, change in adapter.factors.items()}


# --- the member -------------------------------------------------------------------------------------------------------


def _write(task: ExportTask) -> Facts:
    adapter = export_adapter(task.source.adapter, task.source.base, task.output, more_texts=task.texts)
    return {"modules": len(adapter.factors), "weight_bytes": sum(tensor.num_bytes for tensor in adapter.tensors())}


def _runner(directory: Path, source: ExportSource, siblings: Mapping[str, Path]) -> Runner:
    form = Form(FORMAT.name, PLAIN, source.base.directory, adapter=directory, tokenizer=directory)
    return transformers_runner(form, LIMITS["float32"])


FORMAT = Format(
    name="adapter",
    about="the LoRA adapter, for PEFT and vLLM",
    card=CardFormat(
        about="a LoRA adapter in PEFT's format, to be loaded on top of its base model",
        usage="use_adapter.md.j2",
        library="peft",
        is_adapter=True,
    ),
    files=(re.compile(re.escape(ADAPTER_CONFIG_FILE)), re.compile(re.escape(ADAPTER_WEIGHTS_FILE))),
    estimate_bytes=lambda source, dtype: directory_bytes(source.adapter),
    write=_write,
    runner=_runner,
    check_base=lambda config, directory: None,
    settings=(),
)
