"""What is exported: the adapter of a run, or any PEFT adapter directory, with its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.errors import ExportError
from gemma_tune.exporting.verify.prove import Reference
from gemma_tune.identity import json_sha256
from gemma_tune.models.fetch import LocalModel
from gemma_tune.models.resolve import refuse_other, resolve_model
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.adapter_base import find_base
from gemma_tune.runs.adapter_dir import AdapterDir, open_run_adapter, trained_template
from gemma_tune.runs.layout import RunDir, open_run
from gemma_tune.runs.lock import read_lock

if TYPE_CHECKING:
    from gemma_tune.exporting.merge.combine import CombineMethod


@dataclass(frozen=True)
class ExportSource:
    """An adapter and all that goes with it."""

    name: str  # what exported files are called after
    base: LocalModel
    base_files: Mapping[str, str]  # SHA-256 of the base's files
    adapter: Path
    run: RunDir | None  # the run that trained it; None for an adapter of unknown origin
    tokenizer: Path  # directory of the tokenizer that it was trained with
    template: str | None  # the data template as text, where it is known
    trained_dtype: str | None  # what the run computed in when it trained on a 4-bit base, else None
    note: str | None = None  # what of the base could not be compared with the adapter's training, in a sentence

    @property
    def default_output(self) -> Path:
        """Where its exports go unless told otherwise."""
        return self.run.exports if self.run else self.adapter.absolute().parent / f"{self.adapter.name}-export"

    @property
    def base_name(self) -> str:
        """The base's hub id, or the last part of a local path: an export names no folder of this machine."""
        name = public_name(self.base)
        is_path = Path(name).is_dir() or (self.base.revision is None and self.base.directory.name == Path(name).name)
        return Path(name).name if is_path else name

    @property
    def reference(self) -> Reference:
        """What its exports are compared with."""
        return Reference(self.base.directory, self.adapter, self.tokenizer, self.trained_dtype)

    def adapter_hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of the adapter's config and weights."""
        return AdapterDir(self.adapter).hashes()


def public_name(base: LocalModel) -> str:
    """How others find the base: its hub id, whichever alias the recipe names; a local path as it was given."""
    if base.revision is None and base.model is None:
        return base.name
    location = resolve_model(base.name).location
    return base.name if Path(location).is_dir() else location


@dataclass(frozen=True)
class Combination:
    """Runs or adapter directories to combine with the source's adapter, whose weight comes first in `weights`;
    `combine.combine_adapters` says how."""

    others: tuple[Path, ...]
    weights: tuple[float, ...]
    method: CombineMethod = "linear"
    density: float | None = None


def combine_sources(source: ExportSource, combination: Combination, *, directory: Path) -> ExportSource:
    """Write the combined adapter into a new directory below `directory`, or keep what a killed export left there.

    The result is of no run, so nothing is known of its training.
    """
    from gemma_tune.exporting.merge.combine import combine_adapters

    opened = [source, *(open_source(path) for path in combination.others)]
    decided = {**asdict(combination), "others": [each.adapter_hashes() for each in opened]}
    output = directory / f"combined-{json_sha256(decided)[:12]}"
    if not AdapterDir(output).exists:
        combine_adapters(
            [each.adapter for each in opened],
            output,
            weights=combination.weights,
            method=combination.method,
            density=combination.density,
        )
    return replace(source, name=f"{source.name}-combined", adapter=output, run=None, trained_dtype=None)


def open_source(path: Path, *, base: str | None = None) -> ExportSource:
    """Open a run directory or an adapter directory; `base` names its base, which is compared with that of the training.

    Raises:
        GemmaTuneError: there is neither at `path`, the run has no adapter yet, or the base cannot be had.
    """
    adapter, run = AdapterDir(path), None
    if not adapter.exists:
        refuse_other(path, "a run or an adapter", error=ExportError)
        run = open_run(path)
        adapter = open_run_adapter(run)
    found = find_base(adapter, named=base)
    template = trained_template(run) if run else adapter.template_file
    return ExportSource(
        name=run.name if run else adapter.path.absolute().name,
        base=found.model,
        base_files=found.files,
        adapter=adapter.path,
        run=run,
        tokenizer=adapter.path if run else adapter.choose_tokenizer(found.model.directory),
        template=template.read_text(encoding="utf-8") if run or template.is_file() else None,
        trained_dtype=_trained_dtype(run) if run else None,
        note=found.note,
    )


def _trained_dtype(run: RunDir) -> str | None:
    if not load_recipe(run.resolved_recipe).recipe.model.load_in_4bit:
        return None
    # float16 is autocast over float32 weights, which a CPU has not.
    return "bfloat16" if read_lock(run)["precision"]["compute"] == "bfloat16" else "float32"
