"""What an export format is: the seam that every member of `FORMATS` fills, and the task that it is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from re import Pattern
from typing import Any

from gemma_tune.disk import output_directory
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import ExportSettings, MergeDtype
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.required_packages import RequiredPackage
from gemma_tune.exporting.text_files import write_text_files
from gemma_tune.exporting.verify.runner import Runner
from gemma_tune.models.config import TextConfig
from gemma_tune.reporting.card import CardFormat
from gemma_tune.runs.reporter import Reporter

# What a format reports for export.json, such as bits per weight; `notes` and `create_command` are shown to the user.
Facts = dict[str, Any]


@dataclass(frozen=True)
class ExportTask:
    """One export to write."""

    source: ExportSource
    made_from: Path  # directory of the format's parent; the adapter's where it has none
    output: Path  # the directory to write; it does not exist, or is empty
    texts: Mapping[str, str]  # name -> content of small files that go with it
    settings: ExportSettings
    reporter: Reporter
    asked: tuple[str, ...] = ()  # names of the formats that are exported together

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Report (bytes done, bytes in all) under a name."""
        return lambda done, total: self.reporter.progress_bytes(what, done, total)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """Yield a directory with the texts in it, which becomes the output when the block ends without an error."""
        with output_directory(self.output) as directory:
            write_text_files(directory, copied={}, given=self.texts)
            yield directory


def made_from_adapter(source: ExportSource, asked: Sequence[Format], dtype: MergeDtype) -> None:
    """The parent of a format that is made from base and adapter."""


def refuse_quantised(config: TextConfig, directory: Path | None) -> None:
    """Refuse a base that is stored in 4 or 8 bits: merging would round away part of what was trained."""
    if config.quantization:
        raise ExportError(
            f"the base is quantised ({config.quantization}), and no adapter can be merged into it",
            hint="name the model in 16 bits as model.name, or leave export.formats out",
        )


@dataclass(frozen=True)
class Format:
    """One export format."""

    name: str
    about: str  # a phrase for the user
    card: CardFormat  # what a model card says of it
    # patterns of the names of its own files: each matches one at least, and what matches may be pushed
    files: tuple[Pattern[str], ...]
    # (source, dtype) -> bytes on the disk, parents not counted. It may refuse a source.
    estimate_bytes: Callable[[ExportSource, MergeDtype], int]
    write: Callable[[ExportTask], Facts]  # write the task's output, which bears its name only when it is complete
    # (directory, source, siblings) -> how an exported directory is run and compared; `siblings` are the directories of
    # other formats of the same source by name
    runner: Callable[[Path, ExportSource, Mapping[str, Path]], Runner]
    # (source, all formats asked for, dtype) -> the format that it is made from; None for base and adapter
    parent: Callable[[ExportSource, Sequence[Format], MergeDtype], str | None] = made_from_adapter
    # whether what is run is its parent's own file, so that the parent's verdict is its own; such a format is written
    # when the others have theirs, and not offered a parent that failed where there is another
    runs_parent: bool = False
    # (facts of config.json, directory where the base is here) -> None; it refuses a base of which there is no such
    # export
    check_base: Callable[[TextConfig, Path | None], None] = refuse_quantised
    packages: tuple[RequiredPackage, ...] = ()
    settings: tuple[str, ...] = ("dtype",)  # names of the `ExportSettings` that decide its files
