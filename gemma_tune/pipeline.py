"""The whole run on one screen: decide → prepare → answer → train → answer → merge → summary.

Nothing heavy is imported at the top, as the engine must be the first to import transformers.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tune.data.audit import AuditReport
from gemma_tune.data.build import build_datasets
from gemma_tune.data.chat import ChatRenderer
from gemma_tune.data.encode import Datasets
from gemma_tune.data.inputs import Inputs, open_inputs
from gemma_tune.data.pack import require_rows_fit
from gemma_tune.data.tokenize import Encoder
from gemma_tune.engines.base import AttachedLora, Engine
from gemma_tune.engines.precision import Device, Precision, decide_precision, detect_device
from gemma_tune.engines.quiet import libraries_to
from gemma_tune.engines.table import EngineChoice, choose_engine, start_engine
from gemma_tune.errors import DataError, GemmaTuneError, RunError, TrainingInterrupted
from gemma_tune.export.merge_plan import MergeDtype
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.models.files import file_hashes, tokenizer_hashes
from gemma_tune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir, create_run, discard_run, find_interrupted
from gemma_tune.runs.record import Lock, read_json, start_manifest, update_manifest, write_json, write_text
from gemma_tune.runs.reporter import Reporter
from gemma_tune.runs.summary import Question, RunSummary, write_summary

# What may change between a run and its resumption; anything else would mix two runs.
_RESUMABLE_CHANGES = ("training.max_steps", "training.epochs", "training.save_every_steps", "training.keep_checkpoints")
_RESUMABLE_SECTIONS = ("evaluation", "export", "logging", "run")
# Room for the small files of a run: metrics, logs, answers, plot.
_SMALL_FILES_BYTES = 2_000_000


@dataclass(frozen=True)
class Setting:
    """What a run works with on this machine, decided before anything is loaded."""

    recipe: Recipe
    base: LocalModel
    inputs: Inputs
    device: Device
    precision: Precision
    choice: EngineChoice


@dataclass(frozen=True)
class Prepared:
    """Everything a training needs, in memory."""

    engine: Engine
    tokenizer: Any
    encoder: Encoder
    datasets: Datasets
    attached: AttachedLora


def train(loaded: LoadedRecipe, *, reporter: Reporter, resume: bool = False) -> RunDir:
    """Run a recipe from its rows to its summary and return the run directory.

    A run that is refused before its first step leaves nothing behind; one that fails later keeps all it wrote.

    Raises:
        GemmaTuneError: what is wrong, where, and what to do next.
    """
    started = time.monotonic()
    with libraries_to(None):
        setting = _decide(loaded.recipe)
    run = _resumed_run(loaded) if resume else _fresh_run(loaded, setting)
    with libraries_to(run.library_log):
        try:
            prepared = _prepare(run, loaded, setting, reporter=reporter, resume=resume)
        except (GemmaTuneError, KeyboardInterrupt):
            if not resume:
                discard_run(run)
            raise
        try:
            _train_and_summarise(run, setting, prepared, reporter=reporter, resume=resume, started=started)
        except TrainingInterrupted as error:
            update_manifest(run, status="stopped", error=error.message)
            raise TrainingInterrupted(error.message, hint=f"go on with: {resume_command(loaded, run)}") from None
        except BaseException as error:
            update_manifest(run, status="failed", error=f"{type(error).__name__}: {error}")
            raise
    update_manifest(run, status="finished", error=None)
    return run


def resume_command(loaded: LoadedRecipe, run: RunDir) -> str:
    """The command line that continues a run."""
    overrides = [override for override in loaded.overrides if not override.startswith("run.name=")]
    return " ".join(["gemma-tune train", str(loaded.path), *overrides, f"run.name={run.name}", "--resume"])


def _decide(recipe: Recipe) -> Setting:
    base, inputs = open_data(recipe)
    for item in inputs.all:
        if item.template.kind == "preference":
            raise DataError(
                f"{item.source.label} holds preference pairs, which are checked but cannot be trained yet",
                hint="look at them with: gemma-tune data audit; to learn the chosen answers, give them as messages",
            )
    device = detect_device()
    return Setting(
        recipe=recipe,
        base=base,
        inputs=inputs,
        device=device,
        precision=decide_precision(recipe.model.dtype, device=device),
        choice=choose_engine(recipe.model, training=recipe.training, device=device),
    )


def _fresh_run(loaded: LoadedRecipe, setting: Setting) -> RunDir:
    section = loaded.recipe.run
    run = create_run(
        Path(section.output_dir), name=section.name, recipe_name=loaded.name, needed_bytes=_SMALL_FILES_BYTES
    )
    try:
        write_text(run.recipe, loaded.text)
        write_text(run.resolved_recipe, dump_recipe(loaded.recipe))
        write_text(run.template, setting.inputs.template.source_text)
        start_manifest(run)
    except GemmaTuneError:
        discard_run(run)
        raise
    return run


def _resumed_run(loaded: LoadedRecipe) -> RunDir:
    """The run to continue, after checking that the recipe is still the same where it matters (F36)."""
    section = loaded.recipe.run
    run = find_interrupted(Path(section.output_dir), name=section.name, recipe_name=loaded.name)
    before, now = _flat(load_recipe(run.resolved_recipe).recipe), _flat(loaded.recipe)
    changed = [
        f"{path}: {before[path]!r} → {now[path]!r}"
        for path in now
        if before[path] != now[path]
        and path not in _RESUMABLE_CHANGES
        and path.split(".")[0] not in _RESUMABLE_SECTIONS
    ]
    if changed:
        raise RunError(
            f"the recipe is not the one of {run.path}:\n" + "\n".join(f"  {line}" for line in changed),
            hint="undo these changes, or start a new run without --resume",
        )
    update_manifest(run, status="running", error=None)
    return run


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {
        f"{section}.{field}": value
        for section, fields in recipe.model_dump().items()
        for field, value in fields.items()
    }


def _prepare(run: RunDir, loaded: LoadedRecipe, setting: Setting, *, reporter: Reporter, resume: bool) -> Prepared:
    """Data first, so that bad rows are told before a model is loaded."""
    recipe, base = setting.recipe, setting.base
    reporter.stage("engine")
    reporter.detail(f"{setting.choice.name}: {setting.choice.reason}")
    reporter.detail(f"{setting.precision.compute} on {setting.device.name}: {setting.precision.reason}")
    engine = start_engine(setting.choice.name)

    reporter.stage("data")
    tokenizer, encoder, datasets = load_data(recipe, base=base, inputs=setting.inputs)
    write_json(run.data_report, asdict(datasets.report))
    if recipe.training.packing:
        require_rows_fit(datasets.train.lengths, capacity=recipe.tokens_per_pack)
    if datasets.cached:
        reporter.detail("from the token cache: nothing that decides these rows has changed")
    for line in datasets.report.lines():
        reporter.detail(line)
    lock = _lock(loaded, setting, datasets=datasets)
    if resume:
        _require_same_inputs(run, lock)
    write_json(run.lock, asdict(lock))

    reporter.stage("model")
    model = engine.load(
        base.directory, section=recipe.model, precision=setting.precision, max_seq_tokens=recipe.data.max_seq_tokens
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
    return Prepared(engine, tokenizer, encoder, datasets, attached)


def open_data(recipe: Recipe) -> tuple[LocalModel, Inputs]:
    """The base, and the opened sources of the rows with the templates that read them."""
    base = fetch_model(recipe.model.name, revision=recipe.model.revision)
    return base, open_inputs(recipe.data, prefers_chat=base.knows_chat_turns)


def load_data(recipe: Recipe, *, base: LocalModel, inputs: Inputs) -> tuple[Any, Encoder, Datasets]:
    """The tokenizer of the base, and the recipe's rows as token ids and labels."""
    tokenizer, encoder, chat = load_encoder(base, inputs=inputs)
    datasets = build_datasets(
        recipe.data, inputs, tokenizer_files=tokenizer_hashes(base.directory), load=lambda: (encoder, chat)
    )
    return tokenizer, encoder, datasets


def load_encoder(base: LocalModel, *, inputs: Inputs) -> tuple[Any, Encoder, ChatRenderer | None]:
    """The tokenizer of the base, its encoder, and its chat renderer where a template needs one."""
    from gemma_tune.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base.directory)
    needs_chat = any(item.template.kind != "text" for item in inputs.all)
    return tokenizer, Encoder(tokenizer), ChatRenderer.from_tokenizer(tokenizer) if needs_chat else None


def audit_data(recipe: Recipe, *, reporter: Reporter) -> AuditReport:
    """Look at every row of a recipe as it stands, before anything is cleaned or left out."""
    from gemma_tune.data.audit import audit_rows
    from gemma_tune.data.survey import survey_rows

    base, inputs = open_data(recipe)
    _, encoder, chat = load_encoder(base, inputs=inputs)
    rows, bad = survey_rows(recipe.data, inputs, encoder=encoder, chat=chat)
    return audit_rows(
        rows,
        bad=bad,
        max_seq_tokens=recipe.data.max_seq_tokens,
        on_progress=reporter.progress,
    )


def _lock(loaded: LoadedRecipe, setting: Setting, *, datasets: Datasets) -> Lock:
    base = setting.base
    return Lock(
        recipe=loaded.name,
        overrides=list(loaded.overrides),
        base={"name": base.name, "revision": base.revision, "files": file_hashes(base.directory)},
        data={
            "label": datasets.report.label,
            "sha256": datasets.sha256,
            "template_sha256": setting.inputs.template.sha256,
        },
        engine=asdict(setting.choice),
        precision=asdict(setting.precision),
        hardware=asdict(setting.device),
        seed=setting.recipe.training.seed,
    )


def _require_same_inputs(run: RunDir, lock: Lock) -> None:
    """Refuse to continue on another base or on other rows (F36)."""
    before = read_json(run.lock)
    now = asdict(lock)
    changed = [part for part in ("base", "data") if before[part] != now[part]]
    if changed:
        raise RunError(
            f"the {' and the '.join(changed)} of {run.path} changed since it started",
            hint="restore it, or start a new run without --resume",
        )


def _quantization(recipe: Recipe) -> str:
    return "NF4" if recipe.model.load_in_4bit else "LLM.int8" if recipe.model.load_in_8bit else "16 or 32 bits"


def _train_and_summarise(
    run: RunDir, setting: Setting, prepared: Prepared, *, reporter: Reporter, resume: bool, started: float
) -> None:
    # Only now: Unsloth must have been imported before TRL and transformers.
    from gemma_tune.evaluation.answers import (
        answer_examples,
        choose_examples,
        pair_answers,
        spread_over_categories,
    )
    from gemma_tune.training.checkpoint import last_complete_checkpoint
    from gemma_tune.training.run import train_adapter

    recipe, datasets = setting.recipe, prepared.datasets
    resume_from = None
    if resume:
        resume_from, skipped = last_complete_checkpoint(run)
        for line in skipped:
            reporter.warn(line)
        reporter.detail(f"resuming from {resume_from.name}")

    examples = choose_examples(datasets.eval_examples, section=recipe.evaluation)

    def answer(title: str) -> list[Any]:
        reporter.stage(title)
        return answer_examples(
            prepared.attached.loaded,
            engine=prepared.engine,
            tokenizer=prepared.tokenizer,
            encoder=prepared.encoder,
            examples=examples,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            batch_size=recipe.evaluation.batch_size or recipe.training.batch_size,
            on_progress=lambda done, total: reporter.progress("eval rows answered", done, total),
        )

    before = answer("before training") if examples else []
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
        resume_from=resume_from,
    )
    write_text(run.adapter / run.template.name, setting.inputs.template.source_text)
    after = answer("after training") if examples else []
    answers = pair_answers(examples, before, after)
    write_text(run.answers, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answers))

    if recipe.export.merge:
        reporter.stage("merge")
        merge_run(
            run, dtype=recipe.export.dtype, max_shard_bytes=int(recipe.export.max_shard_gb * 1e9), reporter=reporter
        )
    count = len(answers) if recipe.evaluation.exact_match else 0
    summary = RunSummary(
        model=setting.base.name,
        engine=setting.choice.name,
        quantization=_quantization(recipe),
        precision=setting.precision.compute,
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
        merged=recipe.export.merge,
    )
    write_summary(run, summary)
    plot_losses(run)


def plot_losses(run: RunDir) -> None:
    """Draw the loss curve from metrics.jsonl."""
    from gemma_tune.reporting.loss_curve import draw_loss_curve

    draw_loss_curve(run)


def merge_run(
    run: RunDir, *, dtype: MergeDtype, max_shard_bytes: int, reporter: Reporter, output: Path | None = None
) -> Any:
    """Merge a run's adapter into its 16-bit base; the base must be the one the run was trained on."""
    from gemma_tune.export.merge import merge_adapter

    lock = read_json(run.lock)
    base = fetch_model(lock["base"]["name"], revision=lock["base"]["revision"])
    directory = output or run.merged
    report = merge_adapter(
        base.directory,
        run.adapter,
        directory,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        on_progress=lambda done, total: reporter.progress("merged", done, total),
        expected_base=lock["base"]["files"],
    )
    write_text(directory / run.template.name, run.template.read_text(encoding="utf-8"))
    return report
