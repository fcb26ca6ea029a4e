"""The whole run on one screen: decide → prepare → answer → train → answer → summary → export.

Nothing heavy is imported at the top, as the engine must be the first to import transformers.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.encode.pack import require_rows_fit
from gemma_tune.data.inputs import Inputs
from gemma_tune.data.open import load_data, open_data
from gemma_tune.disk import read_json, write_json, write_text
from gemma_tune.engines.base import AttachedLora, Engine
from gemma_tune.engines.choose import EngineDecision, decide_engine, start_engine
from gemma_tune.errors import DataError, GemmaTuneError, RunError, TrainingInterrupted
from gemma_tune.exporting.formats.registry import find_formats
from gemma_tune.exporting.settings import ExportSettings
from gemma_tune.flows.export import export_model
from gemma_tune.machine.cards import detect_card
from gemma_tune.machine.precision import detect_device
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.machine.world import ALONE, World, joined_processes, lost_processes_told
from gemma_tune.models.fetch import LocalModel
from gemma_tune.models.safetensors import file_hashes
from gemma_tune.planning.known_base import Base
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.reporting.facts import PLAN_FILE
from gemma_tune.reporting.write_report import write_report
from gemma_tune.runs.checkpoints import (
    go_back_to,
    has_checkpoints,
    last_complete_checkpoint,
    named_checkpoint,
    step_of,
)
from gemma_tune.runs.layout import RunDir, create_run, discard_run, find_interrupted
from gemma_tune.runs.lock import Lock
from gemma_tune.runs.manifest import Status, read_manifest, start_manifest, update_manifest
from gemma_tune.runs.metrics import keep_metrics_until
from gemma_tune.runs.reporter import Reporter
from gemma_tune.runs.resume import Differences, hold_run, interrupted_run, lock_differences, recipe_differences
from gemma_tune.runs.summary import Question, RunSummary, write_summary
from gemma_tune.runs.warm_start import StartAdapter, find_adapter
from gemma_tune.text import utc_now
from gemma_tune.training.trackers import require_trackers

# Room for the small files of a run: metrics, logs, answers, plot.
_SMALL_FILES_BYTES = 2_000_000


@dataclass(frozen=True)
class Setting:
    """What a run works with on this machine, decided before anything is loaded."""

    recipe: Recipe
    base: LocalModel
    inputs: Inputs
    engine: EngineDecision
    adapter: StartAdapter | None


@dataclass(frozen=True)
class Prepared:
    """Everything a training needs, in memory."""

    engine: Engine
    tokenizer: Any
    encoder: Encoder
    datasets: Datasets
    attached: AttachedLora


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on: its checkpoint, None for the first step; and the settings that differ, a sentence each."""

    checkpoint: Path | None
    changed: list[str]

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint is not None else 0


def train(
    loaded: LoadedRecipe,
    *,
    reporter: Reporter,
    resume: bool = False,
    from_step: int | None = None,
    world: World = ALONE,
) -> RunDir:
    """Run a recipe from its rows to its summary and return the run directory.

    A run that is refused before its first step leaves nothing behind; one that fails later keeps all it wrote.

    Args:
        resume: go on with the interrupted run of this recipe, from its last complete checkpoint.
        from_step: the same from the checkpoint of this step; newer ones are set aside.
        world: the processes that train together, each of which calls this. Process 0 writes the run.

    Raises:
        GemmaTuneError: what is wrong, where, and what to do next.
    """
    with libraries_to(None), joined_processes(world):
        run = _train_together(loaded, reporter=reporter, resume=resume, from_step=from_step, world=world)
    if not world.is_main:
        return run
    section = loaded.recipe.export
    with libraries_to(run.library_log):
        if section.formats:
            export_model(run.path, section.formats, settings=ExportSettings.of_section(section), reporter=reporter)
        write_report(run)
    return run


def _train_together(
    loaded: LoadedRecipe, *, reporter: Reporter, resume: bool, from_step: int | None, world: World
) -> RunDir:
    """The part of a run that all processes share."""
    started = time.monotonic()
    setting = world.in_turn(lambda: decide(loaded.recipe))
    found, state = world.from_main(
        lambda: _find_or_make_run(loaded, asked=resume or from_step is not None, reporter=reporter)
    )
    if state == "finished":
        reporter.detail(f"{found.path} has finished: there is nothing left to train")
        return found
    begun = state == "begun"
    with _working_in(found, world=world) as run:
        try:
            if not (begun and world.is_main):
                _write_beginning(run, loaded, setting)
            resumption = (
                world.from_main(lambda: _plan_resumption(run, loaded, from_step=from_step, reporter=reporter))
                if begun
                else None
            )
            prepared = _prepare(run, loaded, setting, resumption=resumption, reporter=reporter, world=world)
        except (GemmaTuneError, KeyboardInterrupt):
            if not begun:
                discard_run(run)
            raise
        try:
            checkpoint = resumption.checkpoint if resumption is not None else None
            with lost_processes_told():
                _train_and_summarise(
                    run, setting, prepared, reporter=reporter, resume_from=checkpoint, started=started, world=world
                )
        except TrainingInterrupted as error:
            _mark(run, "stopped", error.message)
            raise TrainingInterrupted(
                error.message, hint=f"go on with: {resume_command(loaded, run, world=world)}"
            ) from None
        except KeyboardInterrupt:
            _mark(run, "stopped", "interrupted")
            raise
        except BaseException as error:
            _mark(run, "failed", f"{type(error).__name__}: {error}")
            raise
        update_manifest(run, status="finished", error=None)
    return found


@contextlib.contextmanager
def _working_in(run: RunDir, *, world: World) -> Iterator[RunDir]:
    """The run, held, for process 0; for every other a folder of its own, which goes when it is done.

    So all processes run the same code, only one of them writes the run, and machines need no disk in common.
    """
    with contextlib.ExitStack() as stack:
        if world.is_main:
            stack.enter_context(hold_run(run))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            run = RunDir(Path(folder) / run.name)
            run.path.mkdir()
        stack.enter_context(libraries_to(run.library_log))
        yield run


def resume_command(loaded: LoadedRecipe, run: RunDir, *, world: World = ALONE) -> str:
    """The command line that continues a run."""
    overrides = [override for override in loaded.overrides if not override.startswith("run.name=")]
    processes = ["--nproc", str(world.size)] if world.size > 1 else []
    return shlex.join(
        ["gemma-tune", "train", str(loaded.path), *overrides, f"run.name={run.name}", *processes, "--resume"]
    )


def _mark(run: RunDir, status: Status, error: str) -> None:
    """Record how a run ended; a full disk must not hide why."""
    with contextlib.suppress(RunError):
        update_manifest(run, status=status, error=error)


def decide(recipe: Recipe) -> Setting:
    find_formats(recipe.export.formats)  # a wrong name is told before the training, not after it
    require_trackers(recipe.logging.trackers)
    base, inputs = open_data(recipe)
    for item in inputs.all:
        if item.template.kind == "preference":
            raise DataError(
                f"{item.source.label} holds preference pairs, which are checked but cannot be trained yet",
                hint="look at them with: gemma-tune data audit; to learn the chosen answers, give them as messages",
            )
    return Setting(
        recipe=recipe,
        base=base,
        inputs=inputs,
        engine=decide_engine(recipe, device=detect_device()),
        adapter=find_adapter(recipe.model.adapter, lora=recipe.lora) if recipe.model.adapter else None,
    )


def _find_or_make_run(
    loaded: LoadedRecipe, *, asked: bool, reporter: Reporter
) -> tuple[RunDir, Literal["new", "begun", "finished"]]:
    """The run of a recipe, and whether it is new, goes on, or has nothing left to train."""
    section = loaded.recipe.run
    begun = _run_to_continue(loaded, asked=asked, reporter=reporter)
    if begun is not None:
        return begun, "begun"
    if not asked and section.resume == "auto" and section.name is not None:
        named = RunDir(Path(section.output_dir) / section.name)
        if _has_finished(named, loaded.recipe):
            return named, "finished"
    made = create_run(
        Path(section.output_dir), name=section.name, recipe_name=loaded.name, needed_bytes=_SMALL_FILES_BYTES
    )
    return made, "new"


def _has_finished(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run has trained all that a recipe asks for; a job that is started again finds it so."""
    if not (run.manifest.is_file() and run.resolved_recipe.is_file()) or read_manifest(run).status != "finished":
        return False
    differences = recipe_differences(load_recipe(run.resolved_recipe).recipe, recipe)
    return not differences.refused and not any(line.startswith("training.") for line in differences.allowed)


def _run_to_continue(loaded: LoadedRecipe, *, asked: bool, reporter: Reporter) -> RunDir | None:
    """The run to go on with, or None for a new one. An interrupted run that is left alone is told."""
    section = loaded.recipe.run
    output_dir = Path(section.output_dir)
    if asked:
        return find_interrupted(output_dir, name=section.name, recipe_name=loaded.name)
    run = interrupted_run(output_dir, name=section.name, recipe_name=loaded.name)
    if run is None or section.resume == "auto":
        return run
    manifest = read_manifest(run)
    told = f"{run.path} was interrupted" + (
        f"; its newest checkpoint is of step {manifest.step} of {manifest.total_steps}" if manifest.step else ""
    )
    how = f"go on with: {resume_command(loaded, run)}"
    if section.name is not None:
        raise RunError(told, hint=f"{how}; or choose another run.name")
    if has_checkpoints(run):
        reporter.warn(f"{told}, and this is a new run. To {how}")
    return None


def _write_beginning(run: RunDir, loaded: LoadedRecipe, setting: Setting) -> None:
    """The manifest comes last: without one a run was never begun."""
    write_text(run.recipe, loaded.text)
    write_text(run.resolved_recipe, dump_recipe(loaded.recipe))
    write_text(run.template, setting.inputs.template.source_text)
    start_manifest(run)


def _plan_resumption(run: RunDir, loaded: LoadedRecipe, *, from_step: int | None, reporter: Reporter) -> Resumption:
    """Refuse another recipe, and find the checkpoint to go on from."""
    differences = recipe_differences(load_recipe(run.resolved_recipe).recipe, loaded.recipe)
    _refuse(run, differences.refused)
    if from_step is not None:
        return Resumption(named_checkpoint(run, from_step), differences.allowed)
    if not has_checkpoints(run):
        reporter.warn(f"{run.path} ended before its first checkpoint: it starts again from step 0")
        return Resumption(None, differences.allowed)
    checkpoint, skipped = last_complete_checkpoint(run)
    for line in skipped:
        reporter.warn(line)
    return Resumption(checkpoint, differences.allowed)


def _go_on(run: RunDir, loaded: LoadedRecipe, lock: Lock, resumption: Resumption, *, reporter: Reporter) -> None:
    """Refuse another base, other rows or another engine, tell what else differs, and take the run back to its step."""
    differences = lock_differences(read_json(run.lock), asdict(lock)) if run.lock.is_file() else Differences([], [])
    _refuse(run, differences.refused)
    for line in resumption.changed:
        reporter.detail(f"changed: {line}")
    for line in differences.allowed:
        reporter.warn(f"changed: {line}; the run will not equal one without a break bit for bit")
    for name in go_back_to(run, resumption.checkpoint):
        reporter.detail(f"{name} is set aside")
    if resumption.checkpoint is not None:
        reporter.detail(f"resuming from {resumption.checkpoint.name}")
    keep_metrics_until(run, resumption.step)
    write_text(run.resolved_recipe, dump_recipe(loaded.recipe))
    now = {"at": utc_now(), "step": resumption.step, "changed": [*resumption.changed, *differences.allowed]}
    update_manifest(run, status="running", step=resumption.step, error=None, resumes=[*read_manifest(run).resumes, now])


def _refuse(run: RunDir, differences: Sequence[str]) -> None:
    """Anything that would mix two runs (F36)."""
    if differences:
        raise RunError(
            f"{run.path} was begun with something else:\n" + "\n".join(f"  {line}" for line in differences),
            hint="undo these changes, or start a new run without --resume",
        )


def _prepare(
    run: RunDir,
    loaded: LoadedRecipe,
    setting: Setting,
    *,
    resumption: Resumption | None,
    reporter: Reporter,
    world: World,
) -> Prepared:
    """Data first, so that bad rows are told before a model is loaded."""
    recipe, base = setting.recipe, setting.base
    reporter.stage("engine")
    choice, precision, device = setting.engine.choice, setting.engine.precision, setting.engine.device
    reporter.detail(f"{choice.name}: {choice.reason}")
    reporter.detail(f"{precision.compute} on {device.name}: {precision.reason}")
    if device.kind == "cuda":
        _tell_plan(run, setting, reporter=reporter, world=world)
    engine = start_engine(choice.name)

    reporter.stage("data")
    tokenizer, encoder, datasets = world.in_turn(lambda: load_data(recipe, base=base, inputs=setting.inputs))
    write_json(run.data_report, asdict(datasets.report))
    if recipe.training.packing:
        require_rows_fit(datasets.train.lengths, capacity=recipe.tokens_per_pack)
    if datasets.cached:
        reporter.detail("from the token cache: nothing that decides these rows has changed")
    for line in datasets.report.lines():
        reporter.detail(line)
    lock = lock_of(
        loaded,
        setting,
        data={
            "label": datasets.report.label,
            "sha256": datasets.sha256,
            "template_sha256": setting.inputs.template.sha256,
        },
        world=world,
    )
    _require_equal(recipe, lock, world=world)
    if resumption is not None:
        world.from_main(lambda: _go_on(run, loaded, lock, resumption, reporter=reporter))
    write_json(run.lock, asdict(lock))

    reporter.stage("model")
    model = engine.load(
        base.directory,
        section=recipe.model,
        precision=precision,
        max_seq_tokens=recipe.data.max_seq_tokens,
        will_be_sharded=world.shards(recipe.training.data_parallel),
    )
    attached = engine.attach_lora(
        model,
        section=recipe.lora,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        seed=recipe.training.seed,
    )
    kinds = ", ".join(f"{name} ×{count}" for name, count in attached.num_modules.items())
    reporter.detail(
        f"{base.name}: {attached.num_total:,} parameters, {model.num_quantized_layers} layers in "
        f"{_quantization(recipe)}"
    )
    reporter.detail(f"LoRA rank {recipe.lora.rank}: {attached.num_trainable:,} trained parameters on {kinds}")
    if setting.adapter is not None:
        _start_from(setting.adapter, attached, base=base, reporter=reporter)
    if world.size > 1:
        rows_per_step = recipe.training.batch_size * recipe.training.gradient_accumulation * world.size
        reporter.detail(
            f"{world.size} processes: a step trains on {rows_per_step} {'packs' if recipe.training.packing else 'rows'}"
        )
    return Prepared(engine, tokenizer, encoder, datasets, attached)


def _start_from(adapter: StartAdapter, attached: AttachedLora, *, base: LocalModel, reporter: Reporter) -> None:
    from gemma_tune.training.adapter_weights import read_adapter

    read_adapter(attached.loaded.model, adapter.directory)
    reporter.detail(f"starting from the adapter {adapter.name}")
    if adapter.base != base.name:
        reporter.warn(f"it says that it was trained on {adapter.base}, and the base here is {base.name}")


def _tell_plan(run: RunDir, setting: Setting, *, reporter: Reporter, world: World) -> None:
    """Say whether the run fits its card before anything is loaded, and keep it beside what will be measured."""
    base = setting.base
    planned = plan_recipe(
        setting.recipe,
        card=detect_card(),
        decision=setting.engine,
        base=Base(base.name, base.config, base.model, True),
        processes=world.size,
    )
    (reporter.detail if planned.verdict == "fits" else reporter.warn)(planned.line)
    for change in planned.changes:
        reporter.detail(f"would fit: {' '.join(change.overrides)}")
    derived = {"allocated_bytes": planned.allocated_bytes, "uncertainty_bytes": planned.uncertainty_bytes}
    write_json(run.path / PLAN_FILE, asdict(planned) | derived)


def _require_equal(recipe: Recipe, lock: Lock, *, world: World) -> None:
    """Refuse processes that would train something else than process 0 does."""
    (recipe_0, lock_0), *others = world.gather((recipe, asdict(lock)))
    for rank, (recipe_r, lock_r) in enumerate(others, start=1):
        settings = recipe_differences(recipe_0, recipe_r)
        steps = [line for line in settings.allowed if line.startswith("training.")]  # else they would part midway
        refused = [*settings.refused, *steps, *lock_differences(lock_0, lock_r).refused]
        if refused:
            raise RunError(
                f"process {rank} would train something else than process 0:\n"
                + "\n".join(f"  {line}" for line in refused),
                hint="give every machine the same recipe, overrides and files",
            )


def lock_of(loaded: LoadedRecipe, setting: Setting, *, data: dict[str, Any], world: World) -> Lock:
    base = setting.base
    return Lock(
        recipe=loaded.name,
        overrides=list(loaded.overrides),
        base={"name": base.name, "revision": base.revision, "files": file_hashes(base.directory)},
        data=data,
        engine=asdict(setting.engine.choice),
        precision=asdict(setting.engine.precision),
        hardware=asdict(setting.engine.device),
        seed=setting.recipe.training.seed,
        processes=world.size,
        adapter={"name": setting.adapter.name, "sha256": setting.adapter.sha256} if setting.adapter else None,
    )


def _quantization(recipe: Recipe) -> str:
    return "NF4" if recipe.model.load_in_4bit else "LLM.int8" if recipe.model.load_in_8bit else "16 or 32 bits"


def _train_and_summarise(
    run: RunDir,
    setting: Setting,
    prepared: Prepared,
    *,
    reporter: Reporter,
    resume_from: Path | None,
    started: float,
    world: World,
) -> None:
    # Only now: Unsloth must have been imported before TRL and transformers.
    from gemma_tune.evaluation.answers import (
        answer_examples,
        choose_examples,
        pair_answers,
        spread_over_categories,
    )
    from gemma_tune.inference.settings import AnswerSettings
    from gemma_tune.reporting.loss_curve import draw_loss_curve
    from gemma_tune.training.train_adapter import train_adapter

    recipe, datasets = setting.recipe, prepared.datasets
    examples = choose_examples(datasets.eval_examples, section=recipe.evaluation)

    def answer(title: str, *, in_shares: bool) -> list[Any]:
        # A sharded model computes in all processes or in none: then each of them answers every row.
        mine = world.share(examples) if in_shares else examples
        times = world.size if in_shares else 1
        reporter.stage(title)
        prepared.engine.set_mode(prepared.attached.loaded, training=False)
        answers = answer_examples(
            prepared.attached.loaded.model,
            mine,
            AnswerSettings(
                max_new_tokens=recipe.evaluation.max_new_tokens,
                batch_size=recipe.evaluation.batch_size or recipe.training.batch_size,
            ),
            tokenizer=prepared.tokenizer,
            encoder=prepared.encoder,
            on_progress=lambda done, _: reporter.progress(
                "eval rows answered", min(done * times, len(examples)), len(examples)
            ),
        )
        return world.joined(answers) if in_shares else answers

    before = answer("before training", in_shares=True) if examples else []
    reporter.stage("training")
    result = train_adapter(
        prepared.attached.loaded,
        engine=prepared.engine,
        tokenizer=prepared.tokenizer,
        datasets=datasets,
        recipe=recipe,
        run=run,
        reporter=reporter,
        base_name=setting.base.name,
        base_revision=setting.base.revision,
        world=world,
        resume_from=resume_from,
    )
    if world.is_main:
        write_text(run.adapter / run.template.name, setting.inputs.template.source_text)
    after = answer("after training", in_shares=not world.shards(recipe.training.data_parallel)) if examples else []
    if not world.is_main:
        return
    answers = pair_answers(examples, before, after)
    write_text(run.answers, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answers))

    count = len(answers) if recipe.evaluation.exact_match else 0
    summary = RunSummary(
        model=setting.base.name,
        engine=setting.engine.choice.name,
        quantization=_quantization(recipe),
        precision=setting.engine.precision.compute,
        train_rows=len(datasets.train),
        eval_rows=len(datasets.eval),
        dropped_rows=datasets.report.dropped_too_long,
        num_trainable=prepared.attached.num_trainable,
        steps=result.steps,
        training_seconds=result.seconds,
        total_seconds=time.monotonic() - started,
        num_tokens=result.num_tokens,
        peak_memory_bytes=result.peak_memory_bytes,
        train_loss=result.train_loss,
        eval_loss_before=result.eval_loss_before,
        eval_loss_after=result.eval_loss_after,
        exact_match_before=sum(row.before_matches for row in answers) / count if count else None,
        exact_match_after=sum(row.after_matches for row in answers) / count if count else None,
        exact_match_rows=count,
        questions=[
            Question(row.question, row.expected, row.before, row.after)
            for row in spread_over_categories(answers, count=recipe.evaluation.num_questions)
        ],
    )
    write_summary(run, summary)
    draw_loss_curve(run)
