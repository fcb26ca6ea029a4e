"""From decisions to everything that a training needs in memory: rows, lock, model, adapter."""

from dataclasses import asdict
from typing import Any

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.encode.pack import require_rows_fit
from gemma_tune.data.open import load_data
from gemma_tune.disk import write_json, write_text
from gemma_tune.engines.base import AttachedLora, Engine, LoadSettings
from gemma_tune.engines.choose import start_engine
from gemma_tune.errors import RunError
from gemma_tune.flows.decide import Decisions, lock_of, report_plan
from gemma_tune.machine.world import World
from gemma_tune.recipe.load import dump_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.lock import Lock
from gemma_tune.runs.manifest import start_manifest
from gemma_tune.runs.open_run import FoundRun
from gemma_tune.runs.resume import Resumption, lock_differences, plan_resumption, recipe_differences, rewind_run
from gemma_tune.training.parts import TrainerParts


def begin_run(
    context: RunContext, decisions: Decisions, found: FoundRun, *, from_step: int | None
) -> Resumption | None:
    """Write the first files of a new run, or plan how one that was begun is resumed.

    Raises:
        RunError: the recipe is not that of the run, or there is no such checkpoint.
    """
    run, world = context.run, context.world
    is_new = found.state == "new"
    if is_new or not world.is_main:
        write_text(run.recipe, decisions.loaded.text)
        write_text(run.resolved_recipe, dump_recipe(decisions.recipe))
        write_text(run.template, decisions.inputs.template.source_text)
        start_manifest(run)  # last: without one a run was never begun
    if is_new:
        return None
    return world.broadcast(
        lambda: plan_resumption(run, decisions.recipe, from_step=from_step, reporter=context.reporter)
    )


def prepare(context: RunContext, decisions: Decisions, *, resumption: Resumption | None) -> TrainerParts:
    """Load rows, model and adapter; rows first, so that bad ones are reported before a model is loaded."""
    reporter, choice = context.reporter, decisions.engine.choice
    precision, device = decisions.engine.precision, decisions.engine.device
    reporter.stage("engine")
    reporter.detail(f"{choice.name}: {choice.reason}")
    reporter.detail(f"{precision.compute} on {device.name}: {precision.reason}")
    for note in decisions.notes:
        reporter.warn(note)
    if device.kind == "cuda":
        report_plan(context, decisions)
    engine = start_engine(choice.name)
    tokenizer, encoder, datasets = _load_rows(context, decisions)
    _write_lock(context, decisions, datasets, resumption=resumption)
    attached = _load_model(context, decisions, engine=engine)
    return TrainerParts(context, decisions.recipe, engine, attached.loaded, tokenizer, encoder, datasets)


def _load_rows(context: RunContext, decisions: Decisions) -> tuple[Any, Encoder, Datasets]:
    reporter, recipe = context.reporter, decisions.recipe
    reporter.stage("data")
    tokenizer, encoder, datasets = context.world.main_first(
        lambda: load_data(recipe, base=decisions.base, inputs=decisions.inputs)
    )
    write_json(context.run.data_report, asdict(datasets.report))
    if recipe.training.packing:
        require_rows_fit(datasets.train.lengths, capacity=recipe.tokens_per_pack)
    if datasets.cached:
        reporter.detail("from the token cache: nothing that decides these rows has changed")
    for line in datasets.report.lines():
        reporter.detail(line)
    return tokenizer, encoder, datasets


def _write_lock(
    context: RunContext, decisions: Decisions, datasets: Datasets, *, resumption: Resumption | None
) -> None:
    template_sha256 = decisions.inputs.template.sha256
    data = {"label": datasets.report.label, "sha256": datasets.sha256, "template_sha256": template_sha256}
    lock = lock_of(decisions, data=data, world=context.world)
    require_equal(decisions.recipe, lock, world=context.world)
    if resumption is not None:
        context.world.broadcast(lambda: rewind_run(context, decisions.recipe, lock=lock, resumption=resumption))
    write_json(context.run.lock, asdict(lock))


def _load_model(context: RunContext, decisions: Decisions, *, engine: Engine) -> AttachedLora:
    from gemma_tune.training.adapter_weights import name_base, read_adapter

    reporter, world, recipe, base = context.reporter, context.world, decisions.recipe, decisions.base
    reporter.stage("model")
    settings = LoadSettings(
        recipe.model,
        decisions.engine.precision,
        max_seq_tokens=recipe.data.max_seq_tokens,
        will_be_sharded=world.shards(recipe.training.data_parallel),
    )
    model = engine.load(base.directory, settings)
    attached = engine.attach_lora(
        model,
        section=recipe.lora,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        seed=recipe.training.seed,
    )
    name_base(attached.loaded.model, name=base.name, revision=base.revision)
    kinds = ", ".join(f"{name} ×{count}" for name, count in attached.num_modules.items())
    reporter.detail(
        f"{base.name}: {attached.num_total:,} parameters, {model.num_quantized_layers} layers in "
        f"{decisions.quantization}"
    )
    reporter.detail(f"LoRA rank {recipe.lora.rank}: {attached.num_trainable:,} trained parameters on {kinds}")
    adapter = decisions.adapter
    if adapter is not None:
        read_adapter(attached.loaded.model, adapter.directory)
        reporter.detail(f"starting from the adapter {adapter.name}")
        if adapter.note is not None:
            reporter.warn(adapter.note)
    if world.size > 1:
        rows_per_step = recipe.training.batch_size * recipe.training.gradient_accumulation * world.size
        what = "packs" if recipe.training.packing else "rows"
        reporter.detail(f"{world.size} processes: a step trains on {rows_per_step} {what}")
    return attached


def require_equal(recipe: Recipe, lock: Lock, *, world: World) -> None:
    """Refuse processes that would train something else than process 0 does."""
    (recipe_0, lock_0), *others = world.all_gather((recipe, asdict(lock)))
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
