"""GGUF, for llama.cpp and LM Studio: a member a quantization. Some are converted; llama.cpp makes the others."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.exporting.export_settings import MergeDtype
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.formats import merged
from gemma_tune.exporting.formats.format import ExportTask, Facts, Format
from gemma_tune.exporting.gguf.architecture import check_config, read_architecture
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf, gguf_bytes, lossless_dtype
from gemma_tune.exporting.gguf.quantize import CONVERTED, QUANTIZATIONS, packages_of, quantize_gguf, refuse_unknown
from gemma_tune.exporting.gguf.token_lists import read_gguf_tokenizer
from gemma_tune.exporting.gguf.vocabulary import read_vocabulary
from gemma_tune.exporting.merge.merge_plan import STORED_DTYPE_OF
from gemma_tune.exporting.verify.forms import Form
from gemma_tune.exporting.verify.parity import LIMITS
from gemma_tune.exporting.verify.runner import Runner
from gemma_tune.exporting.verify.weight_check import check_gguf_weights
from gemma_tune.models.catalogue import LICENCE_IDS
from gemma_tune.models.config import TextConfig
from gemma_tune.reporting.card import CardFormat

GGUF_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf", re.ASCII)
CARD = CardFormat(
    about="the whole model, merged in 16 bits and written as GGUF for llama.cpp, Ollama and LM Studio",
    usage="use_gguf.md.j2",
    tags=("gguf", "llama.cpp"),
    is_quantized=True,
)
_PREFIX = "gguf-"
_OPENER = "gemma_tune.exporting.verify.gguf_form:open_gguf"


def find_gguf(directory: Path) -> Path:
    """Return the GGUF file of an exported directory."""
    return next(directory.glob("*.gguf"))


def gguf_runner(name: str, file: Path, *, merged_dir: Path | None = None) -> Runner:
    """Return the runner of a GGUF file called after its quantization; None for `merged_dir`, its source, when gone."""
    converted = file.stem.rpartition("-")[2] in CONVERTED
    return Runner(
        name,
        LIMITS["gguf" if converted else "4bits"],
        Form(name, _OPENER, file),
        check=partial(check_gguf_weights, merged_dir, file) if merged_dir is not None else None,
        tokenize=lambda texts: [*map(read_gguf_tokenizer(file).tokenize, texts)],
        why_not_run=None if _is_installed("llama_cpp") else "llama-cpp-python is not installed",
        why_not_read=None if _is_installed("gguf") else "the package `gguf` is not installed, which reads it",
        notes=("; run and tokenized by llama.cpp", " (by the file's own lists, without llama.cpp)"),
    )


def run_directory(name: str, directory: Path, source: ExportSource, siblings: Mapping[str, Path]) -> Runner:
    """Return the runner of an exported directory that holds a GGUF."""
    return gguf_runner(name, find_gguf(directory), merged_dir=siblings.get(merged.FORMAT.name))


def refuse_unknown_quantization(name: str) -> None:
    """Raise ExportError when `name` is that of a GGUF format, which says why its quantization cannot be made."""
    if name.startswith(_PREFIX) and name != _PREFIX:
        refuse_unknown(name.removeprefix(_PREFIX))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _name_lossless(source: ExportSource, asked: Sequence[Format], dtype: MergeDtype) -> str:
    """The GGUF whose dtype is that of the merged weights: what llama.cpp quantizes from."""
    lossless = lossless_dtype(source.base.directory) if dtype == "auto" else STORED_DTYPE_OF[dtype].lower()
    return _PREFIX + lossless


def _estimate_bytes(quantization: str, source: ExportSource, dtype: MergeDtype) -> int:
    """Refuse a model for which there is no GGUF."""
    directory = source.base.directory
    needed = gguf_bytes(directory, quantization)
    # Of a K-quant the 16-bit file next to it is a parent of its own.
    return needed if quantization in CONVERTED else needed - gguf_bytes(directory, lossless_dtype(directory))


def _convert(quantization: Any, task: ExportTask) -> Facts:
    base = task.source.base
    provenance = GgufProvenance(task.source.name, base_model=task.source.base_name, base_revision=base.revision)
    if base.model is not None:
        licence = LICENCE_IDS[base.model.licence]
        provenance = replace(provenance, license=licence, license_link=base.model.licence_url)
    with task.directory() as directory:
        return convert_to_gguf(
            task.made_from,
            directory / f"{task.source.name}-{quantization}.gguf",
            dtype=quantization,
            provenance=provenance,
            on_progress=task.progress("converted"),
        )


def _quantize(quantization: str, task: ExportTask) -> Facts:
    with task.directory() as directory:
        return quantize_gguf(
            find_gguf(task.made_from),
            directory / f"{task.source.name}-{quantization}.gguf",
            quantization=quantization,
            on_progress=lambda done, total: task.reporter.progress("tensors quantised", done, total),
        )


def check_base(config: TextConfig, directory: Path | None) -> None:
    """Refuse a base that llama.cpp computes or tokenizes otherwise."""
    if directory is None:
        check_config(config, "config.json")
    else:
        read_architecture(directory)
        read_vocabulary(directory, num_rows=config.vocab_size)


def _member(quantization: str) -> Format:
    name, is_converted = _PREFIX + quantization, quantization in CONVERTED
    about = "for llama.cpp and LM Studio" + (", 8 bits" if quantization == "q8_0" else "")
    return Format(
        name=name,
        about=about if is_converted else "quantized by llama.cpp",
        card=CARD,
        files=(GGUF_FILE,),
        estimate_bytes=partial(_estimate_bytes, quantization),
        write=partial(_convert if is_converted else _quantize, quantization),
        runner=partial(run_directory, name),
        parent=(lambda source, asked, dtype: merged.FORMAT.name) if is_converted else _name_lossless,
        check_base=check_base,
        packages=packages_of(quantization),
    )


FORMATS = tuple(map(_member, dict.fromkeys((*CONVERTED, *QUANTIZATIONS))))
