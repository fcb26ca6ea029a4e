"""export.json: what an exported directory holds, what it was made of, and how its check came out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_tune.disk import is_leftover, read_json_object, to_json, write_json
from gemma_tune.errors import ExportError, RunError
from gemma_tune.exporting.verify.parity import Distance
from gemma_tune.exporting.verify.prove import FormReport, ParityReport
from gemma_tune.identity import files_sha256, installed_version
from gemma_tune.models.directory import EXPORT_FILE
from gemma_tune.reporting.card import CARD_FILE
from gemma_tune.runs.lock import RECORDED_PACKAGES
from gemma_tune.text import listed, utc_now

RECORD_FILE = EXPORT_FILE
_CHANGING = (RECORD_FILE, CARD_FILE)
SCHEMA = 1
_PACKAGES = (*RECORDED_PACKAGES, "gguf", "llama-cpp-python")


@dataclass(frozen=True)
class ExportRecord:
    """The content of export.json."""

    format: str
    fingerprint: str  # SHA-256 of everything that decides the files
    base: dict[str, Any]  # name, revision and file hashes; adapter: file hashes
    adapter: dict[str, str]
    # name -> bytes, of all but the record and the card, which may change later; null while it is written
    files: dict[str, int] | None = None
    sha256: dict[str, str] = field(default_factory=dict)  # name -> hash of the same files
    facts: dict[str, Any] = field(default_factory=dict)  # what the writer reports, such as bits per weight
    # figures and verdict, with their date; null when the export was not checked
    verification: dict[str, Any] | None = None
    schema: int = SCHEMA
    created: str = field(default_factory=utc_now)
    packages: dict[str, str | None] = field(
        default_factory=lambda: {name: installed_version(name) for name in _PACKAGES}
    )

    def to_json(self) -> str:
        return to_json(asdict(self))

    @property
    def passed(self) -> bool | None:
        """The verdict; None when there is none."""
        return self.verification["result"]["passed"] if self.verification else None


def read_record(directory: Path) -> ExportRecord:
    """Read the export.json of an exported directory; RunError when it has none or a later version wrote it."""
    values = read_json_object(directory / RECORD_FILE, hint="export again into another directory")
    if values.get("schema") != SCHEMA:
        raise RunError(
            f"{directory / RECORD_FILE} has schema {values.get('schema')!r}, this version reads {SCHEMA}",
            hint="use the gemma-tune that wrote it, or export again",
        )
    try:
        return ExportRecord(**values)
    except TypeError as cause:
        raise RunError(
            f"{directory / RECORD_FILE} is damaged: {cause}", hint="export again into another directory"
        ) from None


def exports_at(path: Path) -> list[Path]:
    """Return the exported directory at a path, or those in it."""
    if (path / RECORD_FILE).is_file():
        return [path]
    return sorted(record.parent for record in path.glob(f"*/{RECORD_FILE}"))


def finish_record(directory: Path, record: ExportRecord, facts: Mapping[str, Any]) -> ExportRecord:
    """Add what was written and store it."""
    files = list_files(directory)
    hashes = files_sha256([directory / name for name in files])
    finished = replace(record, files=files, sha256=hashes, facts=dict(facts))
    write_json(directory / RECORD_FILE, asdict(finished))
    return finished


def list_files(directory: Path) -> dict[str, int]:
    """Name -> bytes of the files of an export: without record and model card, which may change, and leftovers."""
    return {
        path.name: path.stat().st_size
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in _CHANGING and not is_leftover(path)
    }


def require_unchanged(directory: Path, record: ExportRecord) -> None:
    """Refuse a finished export of which a file is gone or does not hold the bytes that were written."""
    wanted, sizes = record.files or {}, list_files(directory)
    hashes = files_sha256([directory / name for name, size in wanted.items() if sizes.get(name) == size])
    same = {name for name, found in hashes.items() if record.sha256.get(name, found) == found}
    differ = [name for name in wanted if name not in same]
    if differ:
        raise ExportError(
            f"{directory} is not as it was exported: {listed(differ)} changed or missing",
            hint="remove it and run the same export again, or give another --output; nothing is ever overwritten",
        )


def add_verification(directory: Path, report: ParityReport, result: FormReport) -> FormReport:
    """Store the figures and the verdict of one export; return the verdict that stands."""
    record = read_record(directory)
    stored = stored_result(record)
    if result.passed is None and stored is not None and stored.passed is False:  # not checked is not mended
        return stored
    shared = {key: value for key, value in asdict(report).items() if key != "exports"}
    verification = {"date": utc_now(), "result": asdict(result), **shared}
    write_json(directory / RECORD_FILE, asdict(replace(record, verification=verification)))
    return result


def has_failed(directory: Path) -> bool:
    """Whether an export lies there that did not pass its check."""
    return (directory / RECORD_FILE).is_file() and read_record(directory).passed is False


def take_verdict(directory: Path, parent: Path) -> FormReport | None:
    """Store the verdict of another export, whose file this one runs; return it, None where it had none."""
    record, made_from = read_record(directory), read_record(parent)
    result = stored_result(made_from)
    if result is None or made_from.verification is None:
        return None
    result = replace(result, name=record.format, reason=f"the file of {made_from.format}: {result.reason}")
    verification = {**made_from.verification, "result": asdict(result)}
    write_json(directory / RECORD_FILE, asdict(replace(record, verification=verification)))
    return result


def stored_result(record: ExportRecord) -> FormReport | None:
    """The verdict of an earlier check."""
    if record.verification is None:
        return None
    result = record.verification["result"]
    distance = result["distance"] and Distance(**result["distance"])
    return FormReport(**{**result, "distance": distance})
