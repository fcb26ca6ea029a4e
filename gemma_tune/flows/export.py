"""Exports of a run or an adapter, and their proof: the entry that the commands and Python call."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import load_data
from gemma_tune.disk import shared_directory
from gemma_tune.errors import DataError
from gemma_tune.exporting.export_formats import (
    PARTS_DIR,
    ExportOutcome,
    export_formats,
    find_exports,
    outcome_of,
    verify_directories,
)
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.export_source import Combination, ExportSource, combine_sources, open_source
from gemma_tune.exporting.formats.registry import find_formats
from gemma_tune.exporting.verify.probe_texts import Probe, built_in_probe, probe_of_rows
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.reporter import Reporter


def export_model(
    path: Path,
    formats: Sequence[str],
    *,
    settings: ExportSettings,
    reporter: Reporter,
    output: Path | None = None,
    base: str | None = None,
    combination: Combination | None = None,
) -> ExportOutcome:
    """Export a run or an adapter directory, and prove every format unless the settings leave that out.

    With a combination the exports go into `output/combined` and are compared on the rows of the first run.
    """
    source = first = open_source(path, base=base)
    if source.note is not None:
        reporter.warn(source.note)
    output = output or source.default_output
    with ExitStack() as stack:
        if combination is not None:
            find_formats(formats)  # a wrong name is told before anything is written
            output = output / "combined"
            stack.enter_context(shared_directory(output / PARTS_DIR))
            source = combine_sources(source, combination, directory=output / PARTS_DIR)
        return export_formats(
            source,
            formats,
            output=output,
            settings=settings,
            make_probe=lambda: _make_probe(first, settings.num_positions, reporter=reporter),
            reporter=reporter,
        )


def verify_model(
    path: Path, *, reporter: Reporter, of: Path | None = None, base: str | None = None, num_positions: int | None = None
) -> ExportOutcome:
    """Prove exports again: those of a run, or those at `path`, which are of the run or adapter `of`."""
    source, directories = find_exports(path, of=of, base=base)
    if source.note is not None:
        reporter.warn(source.note)
    probe = _make_probe(source, num_positions or ExportSettings.num_positions, reporter=reporter)
    reporter.stage("verify")
    siblings = {directory.name: directory for directory in directories}
    parity = verify_directories(source, directories, probe=probe, siblings=siblings, reporter=reporter)
    return outcome_of(directories, parity)


def _make_probe(source: ExportSource, num_positions: int, *, reporter: Reporter) -> Probe:
    """Take eval rows of the run; text of our own where there is no run, or its rows are gone."""
    from gemma_tune.models.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(source.tokenizer))
    if source.run is not None:
        recipe = load_recipe(source.run.resolved_recipe).recipe
        try:
            inputs = open_inputs(recipe.data, prefers_chat=source.base.knows_chat_turns)
            _, _, datasets = load_data(recipe, base=source.base, inputs=inputs)
        except DataError as error:
            reporter.warn(f"the run's rows cannot be read, so built-in text is compared: {error.message}")
        else:
            return probe_of_rows(datasets.eval, datasets.eval_examples, encoder=encoder, num_positions=num_positions)
    return built_in_probe(encoder, num_positions=num_positions)
