"""The one entry to exporting: several formats at once, shared work done once, finished work kept, every format proven.

What a format is made from (a GGUF from the merged weights) is taken from a finished export where there is one, else
written to `.parts` and removed at the end. A killed export is gone on with: what was finished is kept.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import require_free_disk
from gemma_tune.errors import CheckFailed, ExportError, GemmaTuneError
from gemma_tune.exporting.export_record import (
    RECORD_FILE,
    ExportRecord,
    add_verification,
    finish_record,
    list_files,
    read_record,
    stored_result,
)
from gemma_tune.exporting.formats.table import (
    ADAPTER,
    FORMATS,
    GGUF_AS_MERGED,
    MERGED,
    MERGED_4BIT,
    OLLAMA,
    Format,
    find_formats,
    gguf_for_ollama,
)
from gemma_tune.exporting.formats.writers import Job, find_gguf
from gemma_tune.exporting.merge.plan import STORED_DTYPE_OF, MergeDtype
from gemma_tune.exporting.source import TEMPLATE_FILE, ExportSource, open_source
from gemma_tune.exporting.text_files import NOTICE_FILE, licence_notice
from gemma_tune.exporting.verify.forms import Form, Measure, measure_in_child
from gemma_tune.exporting.verify.probe import Probe
from gemma_tune.exporting.verify.prove import Candidate, FormReport, ParityReport, Source, verify_exports
from gemma_tune.identity import json_sha256
from gemma_tune.models.safetensors import BYTES_OF_DTYPE, directory_bytes, stored_tensors
from gemma_tune.reporting.card import CARD_FILE
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import Reporter

PARTS_DIR = ".parts"
_LIMITS_OF_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
# NF4 with double quantisation; what a shard adds is in the merge's own check.
_BYTES_OF_NF4 = 0.53


@dataclass(frozen=True)
class Exported:
    """One exported directory.

    Attributes:
        kept: it was there already, made from the same files.
        result: the verdict; None when it was not checked.
    """

    format: str
    path: Path
    num_bytes: int
    kept: bool
    record: ExportRecord
    result: FormReport | None


@dataclass(frozen=True)
class ExportOutcome:
    """All exports of one call; `parity` holds what they share, None when nothing was checked now."""

    exports: tuple[Exported, ...]
    parity: ParityReport | None

    @property
    def failed(self) -> tuple[Exported, ...]:
        """Exports that did not pass their check."""
        return tuple(each for each in self.exports if each.result is not None and each.result.passed is False)

    def require_passed(self) -> None:
        """Raise CheckFailed when an export failed, naming each, why, and where its files are."""
        if self.failed:
            told = [
                f"  {each.format}: {each.result.reason}; kept at {each.path}" for each in self.failed if each.result
            ]
            raise CheckFailed(
                "an export does not compare as it should with what was trained\n" + "\n".join(told),
                hint="do not give it away; figures are in its export.json, and `gemma-tune verify` measures again",
            )


@dataclass(frozen=True)
class _Step:
    """One directory to write, or to keep when it is finished."""

    format: Format
    output: Path
    made_from: Path
    fingerprint: str
    kept: bool
    is_part: bool


def export(
    source: ExportSource,
    formats: Sequence[str],
    *,
    output: Path,
    reporter: Reporter,
    dtype: MergeDtype = "auto",
    max_shard_bytes: int = 5_000_000_000,
    make_probe: Callable[[], Probe] | None,
    measure: Measure = measure_in_child,
) -> ExportOutcome:
    """Write `output/<format>/` for each format and prove it.

    Everything that can be refused is refused before anything is written: unknown formats, missing packages, outputs
    that were made from something else, too little disk. `make_probe` None leaves the check out.

    Raises:
        ExportError: see above. A failed verdict is no error: see `ExportOutcome.failed`.
    """
    asked = find_formats(formats)
    steps = _plan(source, asked, output=output, dtype=dtype, max_shard_bytes=max_shard_bytes)
    _require_disk(source, steps, output=output, dtype=dtype)
    for step in steps:
        if step.kept:
            _finish_if_killed(step.output)
            reporter.detail(f"{step.format.name}: finished already")
        else:
            _write(step, source, reporter=reporter, dtype=dtype, max_shard_bytes=max_shard_bytes)
    step_of = {step.format.name: step for step in steps}
    wanted = [step_of[each.name] for each in asked]
    parity = None
    if make_probe is not None:
        unproven = [step for step in wanted if not read_record(step.output).passed]
        if unproven:
            reporter.stage("verify")
            parity = verify_directories(
                source,
                [step.output for step in unproven],
                merged=step_of[MERGED].output if MERGED in step_of else None,
                probe=make_probe(),
                reporter=reporter,
                measure=measure,
            )
    for step in wanted:
        _write_card(step.output, source, reporter=reporter)
    shutil.rmtree(output / PARTS_DIR, ignore_errors=True)
    return ExportOutcome(tuple(_exported(step) for step in wanted), parity)


def _exported(step: _Step) -> Exported:
    record = read_record(step.output)
    num_bytes = directory_bytes(step.output)
    return Exported(step.format.name, step.output, num_bytes, step.kept, record, stored_result(record))


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    source: ExportSource, asked: Sequence[Format], *, output: Path, dtype: MergeDtype, max_shard_bytes: int
) -> list[_Step]:
    """What is to be done, in order; a format before those that are made from it."""
    settings = {
        "base": dict(source.base_files),
        "adapter": source.adapter_hashes(),
        "template": source.template,
    }
    names = {each.name for each in asked}
    steps: dict[str, _Step] = {}

    def add(name: str) -> Path:
        if name not in steps:
            parent = _parent(FORMATS[name], asked, source, dtype)
            chosen: dict[str, Any] = {"dtype": dtype} if name != ADAPTER else {}
            chosen |= {"max_shard_bytes": max_shard_bytes} if name in (MERGED, MERGED_4BIT) else {}
            fingerprint = json_sha256({**settings, **chosen, "format": name, "made_from": parent})
            final, part = output / name, output / PARTS_DIR / f"{name}-{fingerprint[:12]}"
            is_part = name not in names and not _is_finished(final, fingerprint)
            place = part if is_part else final
            kept = _is_finished(place, fingerprint)
            if not kept and not is_part:
                _refuse_other(final)
            made_from = source.adapter
            if not kept and parent is not None:
                made_from = add(parent)
            steps[name] = _Step(FORMATS[name], place, made_from, fingerprint, kept, is_part)
        return steps[name].output

    if OLLAMA in names and source.run is None:
        raise ExportError(
            "ollama needs a run, whose data template becomes the Modelfile's", hint="export a GGUF of this adapter"
        )
    for each in asked:
        add(each.name)
    return list(steps.values())


def _parent(each: Format, asked: Sequence[Format], source: ExportSource, dtype: MergeDtype) -> str | None:
    """The format that this one is made from."""
    if each.name == OLLAMA:
        return gguf_for_ollama(asked)
    if each.made_from != GGUF_AS_MERGED:
        return each.made_from
    from gemma_tune.exporting.gguf.convert import lossless_dtype

    if dtype != "auto":
        return f"gguf-{STORED_DTYPE_OF[dtype].lower()}"
    return f"gguf-{lossless_dtype(source.base.directory)}"


def _is_finished(directory: Path, fingerprint: str) -> bool:
    """Whether a complete export of the same files and settings lies there."""
    if not (directory / RECORD_FILE).is_file():
        return False
    record = read_record(directory)
    return record.fingerprint == fingerprint and (record.files is None or record.files == list_files(directory))


def _finish_if_killed(directory: Path) -> None:
    """Complete the record of an export whose process ended between its renaming and its last line."""
    record = read_record(directory)
    if record.files is None:
        finish_record(directory, record, {})


def _refuse_other(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise ExportError(
            f"{directory} exists, and is not the export of this adapter with these settings",
            hint="give another --output, or remove it yourself; nothing is ever overwritten",
        )


def _require_disk(source: ExportSource, steps: Sequence[_Step], *, output: Path, dtype: MergeDtype) -> None:
    """The bytes of all that is still to be written, intermediate files included."""
    missing = [step.format for step in steps if not step.kept]
    needed = sum(_estimated_bytes(each, source, dtype) for each in missing)
    names = ", ".join(each.name for each in missing)
    require_free_disk(output / PARTS_DIR, needed, what=names or "nothing")


def _estimated_bytes(each: Format, source: ExportSource, dtype: MergeDtype) -> int:
    """Bytes of one format, from the headers of the base. Refuses a model for which there is no GGUF."""
    if each.name == ADAPTER:
        return directory_bytes(source.adapter)
    if each.name == OLLAMA:
        return 0  # a link
    tensors = stored_tensors(source.base.directory).values()
    if each.name == MERGED:
        size = None if dtype == "auto" else BYTES_OF_DTYPE[STORED_DTYPE_OF[dtype]]
        return sum(tensor.num_elements * (size or BYTES_OF_DTYPE[tensor.dtype]) for tensor in tensors)
    if each.name == MERGED_4BIT:
        return int(
            sum(t.num_elements * _BYTES_OF_NF4 if t.name.endswith("_proj.weight") else t.num_bytes for t in tensors)
        )
    from gemma_tune.exporting.gguf.convert import gguf_bytes, lossless_dtype

    assert each.quantization is not None, "what is left is a GGUF"
    directory = source.base.directory
    needed = gguf_bytes(directory, each.quantization)
    # Of a K-quant the 16-bit file beside it is a step of its own.
    return needed - gguf_bytes(directory, lossless_dtype(directory)) if each.made_from == GGUF_AS_MERGED else needed


# --- writing and proving --------------------------------------------------------------------------------------------


def _write(step: _Step, source: ExportSource, *, reporter: Reporter, dtype: MergeDtype, max_shard_bytes: int) -> None:
    reporter.stage(step.format.name)
    base = {"name": source.base_name, "revision": source.base.revision, "files": dict(source.base_files)}
    record = ExportRecord(step.format.name, step.fingerprint, base, source.adapter_hashes())
    texts = {RECORD_FILE: record.to_json()}
    if source.template is not None:
        texts[TEMPLATE_FILE] = source.template
    notice = licence_notice(source.base.model)
    if notice is not None:
        texts[NOTICE_FILE] = notice
    job = Job(
        source=source,
        made_from=step.made_from,
        output=step.output,
        texts=texts,
        reporter=reporter,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        quantization=step.format.quantization,
    )
    module_name, function_name = step.format.writer.split(":")
    facts: dict[str, Any] = getattr(importlib.import_module(module_name), function_name)(job)
    finish_record(step.output, record, facts)


def _write_card(directory: Path, source: ExportSource, *, reporter: Reporter) -> None:
    """README.md for the hub, with what the check found. Of a bare adapter too little is known for one."""
    if source.run is None or (directory / CARD_FILE).exists():
        return
    from gemma_tune.exporting.export_card import write_model_card

    try:
        write_model_card(directory, source.run, base=source.base)
    except GemmaTuneError as error:
        reporter.warn(f"{directory} has no model card: {error.message}")


def verify_directories(
    source: ExportSource,
    directories: Sequence[Path],
    *,
    probe: Probe,
    reporter: Reporter,
    merged: Path | None = None,
    measure: Measure = measure_in_child,
) -> ParityReport:
    """Prove exported directories and store each verdict in its export.json.

    `merged` is the merged directory that GGUFs were made from, for machines without llama.cpp.
    """
    candidates = [_candidate(directory, source, merged) for directory in directories]
    report = verify_exports(
        candidates,
        Source(source.base.directory, source.adapter, source.tokenizer, source.trained_dtype),
        probe=probe,
        reporter=reporter,
        measure=measure,
    )
    for directory, result in zip(directories, report.exports, strict=True):
        add_verification(directory, report, result)
    return report


def _candidate(directory: Path, source: ExportSource, merged: Path | None) -> Candidate:
    each = FORMATS[read_record(directory).format]
    if each.name == ADAPTER:
        form = Form(each.name, "plain", source.base.directory, adapter=directory, tokenizer=directory)
        return Candidate(form, "float32")
    if each.name == MERGED:
        found = {tensor.dtype for tensor in stored_tensors(directory).values()}
        coarsest = next(dtype for dtype in _LIMITS_OF_DTYPE if dtype in found)
        return Candidate(Form(each.name, "plain", directory, tokenizer=directory), _LIMITS_OF_DTYPE[coarsest])
    if each.name == MERGED_4BIT:
        return Candidate(Form(each.name, "plain", directory, tokenizer=directory), "4bits", against_trained=True)
    gguf = find_gguf(directory)
    quantization = gguf.stem.rpartition("-")[2]
    limits = each.limits or FORMATS[f"gguf-{quantization}"].limits
    assert limits is not None, "a GGUF has limits"
    return Candidate(Form(each.name, "gguf", gguf), limits, merged=merged)


def find_exports(path: Path, *, of: Path | None = None, base: str | None = None) -> tuple[ExportSource, list[Path]]:
    """What was exported, and the exported directories: those of a run or adapter at `path`, or those that lie there.

    `of` is the run or adapter that exports at `path` are of; the run that holds them unless given.

    Raises:
        GemmaTuneError: there are none, or nobody says what they are of.
    """
    directories = _exports_at(path)
    if directories:
        return open_source(of or _run_above(path), base=base), directories
    source = open_source(path, base=base)
    directories = _exports_at(source.default_output)
    if not directories:
        raise ExportError(f"{path} has no export yet", hint=f"make one: gemma-tune export {path} --format {MERGED}")
    return source, directories


def _exports_at(path: Path) -> list[Path]:
    """The exported directory at a path, or those in it."""
    if (path / RECORD_FILE).is_file():
        return [path]
    return sorted(record.parent for record in path.glob(f"*/{RECORD_FILE}"))


def _run_above(path: Path) -> Path:
    for parent in path.absolute().parents:
        if RunDir(parent).manifest.is_file():
            return parent
    raise ExportError(
        f"{path} lies in no run, so what it should be equal to is not known", hint="name the run or adapter: --of RUN"
    )


def outcome_of(directories: Sequence[Path], parity: ParityReport | None) -> ExportOutcome:
    """The exports that lie in directories, with their stored verdicts."""
    records = [(directory, read_record(directory)) for directory in directories]
    return ExportOutcome(
        tuple(
            Exported(record.format, path, directory_bytes(path), True, record, stored_result(record))
            for path, record in records
        ),
        parity,
    )
