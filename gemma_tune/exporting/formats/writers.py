"""One function a format: it writes a directory that bears its name only when it is complete, and returns facts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune.disk import output_directory, write_text
from gemma_tune.exporting.formats.adapter import export_adapter
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.exporting.gguf.header import GgufReport
from gemma_tune.exporting.gguf.quantize import quantize_gguf
from gemma_tune.exporting.merge.plan import MergeDtype
from gemma_tune.exporting.source import ExportSource
from gemma_tune.exporting.text_files import licence_notice
from gemma_tune.models.catalogue import LICENCE_IDS
from gemma_tune.runs.reporter import Reporter


@dataclass(frozen=True)
class Job:
    """One export to write.

    Attributes:
        made_from: directory of the export that this one is made from; the adapter's where it is base and adapter.
        output: the directory to write; it does not exist, or is empty.
        texts: name -> content of small files that go with it.
        quantization: of a GGUF.
    """

    source: ExportSource
    made_from: Path
    output: Path
    texts: Mapping[str, str]
    reporter: Reporter
    dtype: MergeDtype = "auto"
    max_shard_bytes: int = 5_000_000_000
    quantization: str | None = None

    def progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.reporter.progress_bytes(what, done, total)


def write_adapter(job: Job) -> dict[str, Any]:
    report = export_adapter(job.source.adapter, job.source.base, job.output, more_texts=job.texts)
    return {"modules": report.num_modules, "weight_bytes": report.weight_bytes}


def write_merged(job: Job) -> dict[str, Any]:
    from gemma_tune.exporting.merge.write import merge_adapter

    source = job.source
    report = merge_adapter(
        source.base.directory,
        source.adapter,
        job.output,
        dtype=job.dtype,
        max_shard_bytes=job.max_shard_bytes,
        on_progress=job.progress("merged"),
        expected_base=source.base_files,
        more_texts=job.texts,
    )
    return {
        "dtype": report.dtype,
        "tensors": report.tensors_total,
        "tensors_changed": report.tensors_merged + report.tensors_replaced,
        "weight_bytes": report.weight_bytes,
        "notes": list(report.notes),
    }


def write_merged_4bit(job: Job) -> dict[str, Any]:
    from gemma_tune.exporting.formats.nf4 import quantize_merged

    report = quantize_merged(
        job.made_from,
        job.output,
        max_shard_bytes=job.max_shard_bytes,
        on_progress=job.progress("quantised"),
        more_texts=job.texts,
    )
    return {"bits_per_weight": report.bits_per_weight, "weight_bytes": report.weight_bytes}


def write_gguf(job: Job) -> dict[str, Any]:
    assert job.quantization is not None, "a GGUF has a quantization"
    base = job.source.base
    provenance = GgufProvenance(name=job.source.name, base_model=job.source.base_name, base_revision=base.revision)
    if base.model is not None:
        licence = LICENCE_IDS[base.model.licence]
        provenance = replace(provenance, license=licence, license_link=base.model.licence_url)
    with _directory_with_texts(job) as directory:
        report = convert_to_gguf(
            job.made_from,
            directory / _gguf_name(job),
            dtype=job.quantization,  # type: ignore[arg-type]
            provenance=provenance,
            on_progress=job.progress("converted"),
        )
    return _gguf_facts(report)


def write_quantized_gguf(job: Job) -> dict[str, Any]:
    assert job.quantization is not None, "a GGUF has a quantization"
    with _directory_with_texts(job) as directory:
        report = quantize_gguf(
            find_gguf(job.made_from),
            directory / _gguf_name(job),
            quantization=job.quantization,
            on_progress=lambda done, total: job.reporter.progress("tensors quantised", done, total),
        )
    return _gguf_facts(report)


def write_ollama(job: Job) -> dict[str, Any]:
    """A Modelfile beside its GGUF, which shares its bytes with the export that it comes from where the disk can."""
    from gemma_tune.exporting.formats.modelfile import write_modelfile

    assert job.source.run is not None, "the plan refuses ollama without a run"
    gguf = find_gguf(job.made_from)
    with _directory_with_texts(job) as directory:
        try:
            os.link(gguf, directory / gguf.name)
        except OSError:
            shutil.copyfile(gguf, directory / gguf.name)
        licence = licence_notice(job.source.base.model)
        report = write_modelfile(job.source.run, directory / gguf.name, licence=licence)
    return {"create_command": report.create_command, "notes": list(report.notes)}


def find_gguf(directory: Path) -> Path:
    """The GGUF file of an exported directory."""
    return next(directory.glob("*.gguf"))


@contextmanager
def _directory_with_texts(job: Job) -> Iterator[Path]:
    with output_directory(job.output) as directory:
        for name, text in job.texts.items():
            write_text(directory / name, text)
        yield directory


def _gguf_name(job: Job) -> str:
    return f"{job.source.name}-{job.quantization}.gguf"


def _gguf_facts(report: GgufReport) -> dict[str, Any]:
    return {
        "bits_per_weight": report.bits_per_weight,
        "tensor_types": dict(report.tensor_types),
        "notes": list(report.notes),
    }
