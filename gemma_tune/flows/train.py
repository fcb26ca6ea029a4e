"""The whole run on one screen: decide → open the run → prepare → answer → train → answer → summary → conclude.

Nothing heavy is imported at the top, as the engine must be the first to import transformers.
"""

import shlex
from dataclasses import dataclass

from gemma_tune.errors import ExportError, GemmaTuneError, RunError
from gemma_tune.exporting.export_formats import ExportOutcome
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.flows.decide import Decisions, decide
from gemma_tune.flows.export import export_model
from gemma_tune.flows.prepare import begin_run, prepare
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.machine.world import ALONE, World, process_group
from gemma_tune.recipe.load import LoadedRecipe
from gemma_tune.recipe.schema import ExportSection
from gemma_tune.reporting.write_report import write_report
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.open_run import (
    FoundRun,
    discarding_when_refused,
    find_or_create_run,
    recording_the_end,
    working_in,
)
from gemma_tune.runs.reporter import Reporter


@dataclass(frozen=True)
class TrainOutcome:
    """A finished run, and what came of the exports that its recipe names."""

    run: RunDir
    exports: ExportOutcome | None = None  # None where the recipe names no format, or they could not be made
    error: GemmaTuneError | None = None  # why they could not be made

    def require_exported(self) -> None:
        """Raise what went wrong with the exports: they could not be made (`error`), or one failed its check."""
        if self.error is not None:
            raise self.error
        if self.exports is not None:
            self.exports.require_passed()


def train(
    loaded: LoadedRecipe,
    *,
    reporter: Reporter,
    resume: bool = False,
    from_step: int | None = None,
    world: World = ALONE,
) -> TrainOutcome:
    """Run a recipe from its rows to its exports; `train_run`, then `conclude`."""
    run = train_run(loaded, reporter=reporter, resume=resume, from_step=from_step, world=world)
    return conclude(run, loaded.recipe.export, reporter=reporter) if world.is_main else TrainOutcome(run)


def train_run(
    loaded: LoadedRecipe,
    *,
    reporter: Reporter,
    resume: bool = False,
    from_step: int | None = None,
    world: World = ALONE,
) -> RunDir:
    """Run a recipe from its rows to its summary and report.

    A run that is refused before its first step leaves nothing behind; one that fails later keeps all it wrote.

    Args:
        resume: continue the interrupted run of this recipe, from its last complete checkpoint.
        from_step: the same from the checkpoint of this step; newer ones are set aside.
        world: the processes that train together, each of which calls this. Process 0 writes the run.

    Raises:
        GemmaTuneError: what is wrong, where, and what to do next.
    """
    asked = resume or from_step is not None
    with libraries_to(None), process_group(world):
        decisions = world.main_first(lambda: decide(loaded))
        found = world.broadcast(lambda: find_or_create_run(loaded, asked=asked, reporter=reporter))
        if found.state == "finished":
            reporter.detail(f"{found.run.path} has finished: there is nothing left to train")
        else:
            with working_in(found, reporter=reporter, world=world) as context:
                _train_and_summarise(context, decisions, found, from_step=from_step)
    if world.is_main:
        _write_report(found.run, reporter=reporter)
    return found.run


def _train_and_summarise(context: RunContext, decisions: Decisions, found: FoundRun, *, from_step: int | None) -> None:
    with discarding_when_refused(context.run):
        resumption = begin_run(context, decisions, found, from_step=from_step)
        parts = prepare(context, decisions, resumption=resumption)
    with recording_the_end(context, decisions.loaded):
        # Only now: Unsloth must have been imported before TRL and transformers.
        from gemma_tune.evaluation.answers import answer_rows
        from gemma_tune.flows.summarise import describe_adapter, summarise
        from gemma_tune.training.train_adapter import train_adapter

        before = answer_rows(parts, title="before training")
        result = train_adapter(
            parts,
            resume_from=resumption.checkpoint if resumption else None,
            describe=lambda directory: describe_adapter(directory, decisions),
        )
        after = answer_rows(parts, title="after training", is_sharded=parts.shards_model)
        if context.world.is_main:
            summarise(decisions, parts, result, before=before, after=after)


def conclude(run: RunDir, section: ExportSection, *, reporter: Reporter) -> TrainOutcome:
    """Make and prove the exports of a finished run, and write its report again with their verdicts."""
    if not section.formats:
        return TrainOutcome(run)
    try:
        with libraries_to(run.library_log):
            settings = ExportSettings.of(dtype=section.dtype, max_shard_gb=section.max_shard_gb, verify=section.verify)
            outcome = TrainOutcome(run, export_model(run.path, section.formats, settings=settings, reporter=reporter))
    except (GemmaTuneError, OSError) as error:
        outcome = TrainOutcome(run, error=_export_error(run, section, error))
    _write_report(run, reporter=reporter)
    return outcome


def _write_report(run: RunDir, *, reporter: Reporter) -> None:
    """A run whose report cannot be written is finished all the same."""
    try:
        with libraries_to(None):
            write_report(run)
    except RunError as error:
        reporter.warn(f"no {run.report_page.name}: {error.message}")


def _export_error(run: RunDir, section: ExportSection, error: GemmaTuneError | OSError) -> GemmaTuneError:
    """The error of an export with the command that makes it again."""
    command = ["gemma-tune", "export", str(run.path), "--format", ",".join(section.formats)]
    command += ["--dtype", section.dtype] if section.dtype != "auto" else []
    command += ["--max-shard-gb", f"{section.max_shard_gb:g}"] if section.max_shard_gb != 5 else []
    command += [] if section.verify else ["--skip-verify"]
    again = f"the run is finished; export it with: {shlex.join(command)}"
    if isinstance(error, OSError):
        return ExportError(f"the export failed: {error.strerror or error}", hint=again)
    return type(error)(error.message, hint=f"{error.hint}; {again}" if error.hint else again)
