"""The one entry to exporting: several formats at once, shared work done once, finished work kept, every format proven.

What a format is made from (a GGUF from the merged weights) is taken from a finished export where there is one, else
written to `.parts` and removed at the end. A killed export is resumed: what was finished is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tune.disk import directory_bytes, require_free_disk, shared_directory
from gemma_tune.errors import CheckFailed, ExportError, GemmaTuneError
from gemma_tune.exporting import export_record as records
from gemma_tune.exporting.export_settings import ExportSettings, MergeDtype
from gemma_tune.exporting.export_source import ExportSource, open_source
from gemma_tune.exporting.formats.format import ExportTask, Format
from gemma_tune.exporting.formats.registry import FORMATS, find_formats
from gemma_tune.exporting.text_files import NOTICE_FILE, licence_notice
from gemma_tune.exporting.verify.forms import Measure, measure_in_child
from gemma_tune.exporting.verify.probe_texts import Probe
from gemma_tune.exporting.verify.prove import FormReport, ParityReport, verify_exports
from gemma_tune.identity import json_sha256
from gemma_tune.reporting.card import CARD_FILE
from gemma_tune.runs.adapter_dir import TEMPLATE_FILE
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import Reporter
from gemma_tune.text import in_shell

PARTS_DIR = ".parts"


@dataclass(frozen=True)
class Exported:
    """One exported directory; `kept`: it was there already, made from the same files. `result` is None when it was not
    checked."""

    format: str
    path: Path
    num_bytes: int
    kept: bool
    record: records.ExportRecord
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
    parent: str | None
    fingerprint: str
    kept: bool


def export_formats(
    source: ExportSource,
    formats: Sequence[str],
    *,
    output: Path,
    settings: ExportSettings,
    make_probe: Callable[[], Probe],
    reporter: Reporter,
    measure: Measure = measure_in_child,
) -> ExportOutcome:
    """Write `output/<format>/` for each format and prove it, unless the settings leave that out.

    Everything that can be refused is refused before anything is written: unknown formats, missing packages, outputs
    that were made from something else, too little disk. A failed verdict is not an error: see `ExportOutcome.failed`.
    """
    asked = find_formats(formats)
    asked_names = tuple(each.name for each in asked)
    steps = _plan(source, asked, output=output, settings=settings)
    missing = [step.format for step in steps.values() if not step.kept]
    needed_bytes = sum(each.estimate_bytes(source, settings.dtype) for each in missing)
    require_free_disk(output / PARTS_DIR, needed_bytes, what=", ".join(each.name for each in missing) or "nothing")
    with shared_directory(output / PARTS_DIR, sweeps=[output / each.name for each in asked]):
        if not all(step.output.is_dir() for step in steps.values() if step.kept):  # another export has just removed it
            steps = _plan(source, asked, output=output, settings=settings)
        later = [name for name, step in steps.items() if step.format.runs_parent and step.parent in asked_names]

        def write(names: Iterable[str]) -> None:
            for step in (steps[name] for name in names):
                if step.kept:
                    _finish_if_killed(step.output)
                    reporter.detail(f"{step.format.name}: finished already")
                else:
                    _write(step, source, settings, asked=asked_names, reporter=reporter)

        write(name for name in steps if name not in later)
        unproven = [
            steps[name].output
            for name in asked_names
            if settings.verify and name not in later and not records.read_record(steps[name].output).passed
        ]
        parity = None
        if unproven:
            reporter.stage("verify")
            parity = verify_directories(
                source,
                unproven,
                siblings={name: step.output for name, step in steps.items()},
                probe=make_probe(),
                reporter=reporter,
                measure=measure,
            )
        for name in later:
            step = steps[name]
            parent = _choose_parent(step.format, source, asked, output=output, dtype=settings.dtype)
            if parent != step.parent:  # which has failed by now
                steps[name] = step = _plan(source, asked, output=output, settings=settings)[name]
            write([name])
            made_from = steps[str(parent)].output
            result = records.take_verdict(step.output, made_from) if settings.verify else None
            if parity is not None and result is not None:
                parity = replace(parity, exports=(*parity.exports, result))
        wanted = [steps[name] for name in asked_names]
        for step in wanted:
            _write_card(step.output, source, reporter=reporter)
    return ExportOutcome(tuple(_exported(step.output, kept=step.kept) for step in wanted), parity)


def _exported(directory: Path, *, kept: bool = True) -> Exported:
    record = records.read_record(directory)
    return Exported(record.format, directory, directory_bytes(directory), kept, record, records.stored_result(record))


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(source: ExportSource, asked: Sequence[Format], *, output: Path, settings: ExportSettings) -> dict[str, _Step]:
    """What is to be done, by format; a format before those that are made from it."""
    inputs = {"base": dict(source.base_files), "adapter": source.adapter_hashes(), "template": source.template}
    steps: dict[str, _Step] = {}

    def add(each: Format) -> Path:
        if each.name not in steps:
            parent = _choose_parent(each, source, asked, output=output, dtype=settings.dtype)
            chosen = {name: getattr(settings, name) for name in each.settings}
            fingerprint = json_sha256({**inputs, **chosen, "format": each.name, "made_from": parent})
            final, part = output / each.name, output / PARTS_DIR / f"{each.name}-{fingerprint[:12]}"
            is_measured = settings.verify and each in asked
            is_part = each not in asked and not _is_finished(final, fingerprint, is_measured=is_measured)
            place = part if is_part else final
            kept = _is_finished(place, fingerprint, is_measured=is_measured)
            if not kept and not is_part:
                _refuse_other(final)
            made_from = source.adapter if kept or parent is None else add(FORMATS[parent])
            steps[each.name] = _Step(each, place, made_from, parent, fingerprint, kept)
        return steps[each.name].output

    for each in asked:
        add(each)
    return steps


def _choose_parent(
    each: Format, source: ExportSource, asked: Sequence[Format], *, output: Path, dtype: MergeDtype
) -> str | None:
    """What a format is made from; one that runs its parent's file is not made from one that failed, if it can be."""
    parent = each.parent(source, asked, dtype)
    if each.runs_parent and parent in [other.name for other in asked]:
        sound = [other for other in asked if not records.has_failed(output / other.name)]
        chosen = each.parent(source, sound, dtype)
        return chosen if chosen in [other.name for other in sound] else parent
    return parent


def _is_finished(directory: Path, fingerprint: str, *, is_measured: bool) -> bool:
    """Whether a complete export of the same files and settings lies there.

    Raises:
        ExportError: it was changed since. One without a verdict that `is_measured` next is judged by that.
    """
    if not (directory / records.RECORD_FILE).is_file():
        return False
    record = records.read_record(directory)
    if record.fingerprint != fingerprint or record.files is None:
        return record.fingerprint == fingerprint
    if is_measured and not record.passed:
        return record.files == records.list_files(directory)
    records.require_unchanged(directory, record)
    return True


def _finish_if_killed(directory: Path) -> None:
    """Complete the record of an export whose process ended between its renaming and its last line."""
    record = records.read_record(directory)
    if record.files is None:
        records.finish_record(directory, record, {})


def _refuse_other(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise ExportError(
            f"{directory} exists, and is not the export of this adapter with these settings",
            hint="give another --output, or remove it yourself; nothing is ever overwritten",
        )


# --- writing and proving --------------------------------------------------------------------------------------------


def _write(
    step: _Step, source: ExportSource, settings: ExportSettings, *, asked: tuple[str, ...], reporter: Reporter
) -> None:
    reporter.stage(step.format.name)
    base = {"name": source.base_name, "revision": source.base.revision, "files": dict(source.base_files)}
    record = records.ExportRecord(step.format.name, step.fingerprint, base, source.adapter_hashes())
    texts = {records.RECORD_FILE: record.to_json()}
    if source.template is not None:
        texts[TEMPLATE_FILE] = source.template
    notice = licence_notice(source.base.model)
    if notice is not None:
        texts[NOTICE_FILE] = notice
    task = ExportTask(source, step.made_from, step.output, texts, settings, reporter, asked)
    records.finish_record(step.output, record, step.format.write(task))


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
    siblings: Mapping[str, Path] | None = None,
    measure: Measure = measure_in_child,
) -> ParityReport:
    """Prove exported directories and store each verdict in its export.json.

    `siblings` are directories of the same source by format: what others were made from is compared with them.
    """
    formats = [FORMATS.find(records.read_record(directory).format, error=ExportError) for directory in directories]
    runners = [
        each.runner(directory, source, siblings or {}) for each, directory in zip(formats, directories, strict=True)
    ]
    report = verify_exports(runners, source.reference, probe=probe, reporter=reporter, measure=measure)
    pairs = zip(directories, report.exports, strict=True)
    return replace(report, exports=tuple(records.add_verification(each, report, result) for each, result in pairs))


def find_exports(path: Path, *, of: Path | None = None, base: str | None = None) -> tuple[ExportSource, list[Path]]:
    """What was exported, and the exported directories: those of a run or adapter at `path`, or those that lie there.

    `of` is the run or adapter that exports at `path` are of; the run that holds them unless given.

    Raises:
        GemmaTuneError: there are none, or nobody says what they are of.
    """
    directories = records.exports_at(path)
    if directories:
        return open_source(of or _run_above(path), base=base), directories
    source = open_source(path, base=base)
    directories = records.exports_at(source.default_output)
    if not directories:
        raise ExportError(
            f"{path} has no export yet", hint=f"make one: gemma-tune export {in_shell(path)} --format merged-16bit"
        )
    return source, directories


def _run_above(path: Path) -> Path:
    for parent in path.absolute().parents:
        if RunDir(parent).manifest.is_file():
            return parent
    raise ExportError(
        f"{path} lies in no run, so what it should be equal to is not known", hint="name the run or adapter: --of RUN"
    )


def outcome_of(directories: Sequence[Path], parity: ParityReport | None) -> ExportOutcome:
    """The exports that lie in directories, with their stored verdicts."""
    return ExportOutcome(tuple(map(_exported, directories)), parity)
