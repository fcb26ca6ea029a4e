"""One training: from a model with an adapter and encoded rows to a trained adapter on disk (LEAF)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import set_seed

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.disk import replaced_directory
from gemma_tune.engines.base import Engine, LoadedModel
from gemma_tune.errors import RunError, TrainingInterrupted
from gemma_tune.machine.world import ALONE, World
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest, update_manifest
from gemma_tune.runs.reporter import Reporter
from gemma_tune.training.adapter_weights import name_base, write_adapter
from gemma_tune.training.callbacks import CheckpointCallback, InterruptCallback, MetricsCallback, peak_memory_bytes
from gemma_tune.training.dry_run import rehearse
from gemma_tune.training.guards import GuardCallback, require_finite_adapter
from gemma_tune.training.leak_probe import find_leak
from gemma_tune.training.loop import TokenWeightedTrainer, build_trainer, to_sft_config
from gemma_tune.training.row_attention import attending_by_row
from gemma_tune.training.sealed_checkpoints import TRAINER_STATE
from gemma_tune.training.sharding import fsdp_settings
from gemma_tune.training.trackers import tracking


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        steps: optimizer steps done.
        seconds: wall time of the training.
        num_tokens: real tokens trained on, padding left out. All three count what was done before a resume as well.
        train_loss: mean loss of the last tenth of the logged steps, nats a supervised token.
        eval_loss_before, eval_loss_after: on the eval rows, nats a supervised token; None without eval rows.
        peak_memory_bytes: of the card on CUDA, of the process elsewhere.
    """

    steps: int
    seconds: float
    num_tokens: int
    train_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    peak_memory_bytes: int


def train_adapter(
    loaded: LoadedModel,
    *,
    engine: Engine,
    tokenizer: Any,
    datasets: Datasets,
    recipe: Recipe,
    run: RunDir,
    reporter: Reporter,
    base_name: str,
    base_revision: str | None,
    world: World = ALONE,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train, and save the adapter with its tokenizer into `run.adapter`; every process of the world calls this.

    Args:
        run: of process 0 the run; of the others a folder of their own, which nobody keeps.
        resume_from: the checkpoint to go on from, on the disk of process 0.

    Raises:
        TrainingStopped: going on would ruin the run.
        TrainingInterrupted: a signal came, or the time is up; a checkpoint was saved.
        RunError: a run that was trained packed would go on unpacked, or the other way round; a checkpoint cannot be
            written or read.
    """
    name_base(loaded.model, name=base_name, revision=base_revision)
    attending = attending_by_row(loaded) if recipe.training.packing else nullcontext()
    with attending, tracking(recipe.logging.trackers, run=run):
        pack_tokens = _settle_packing(
            loaded,
            engine=engine,
            tokenizer=tokenizer,
            datasets=datasets,
            recipe=recipe,
            reporter=reporter,
            world=world,
        )
        world.from_main(lambda: _keep_packing(run, packed=pack_tokens is not None, resumes=resume_from is not None))
        trainer = _build(
            loaded, tokenizer=tokenizer, datasets=datasets, recipe=recipe, run=run, pack_tokens=pack_tokens, world=world
        )
        engine.set_mode(loaded, training=True)
        eval_loss_before = rehearse(
            trainer,
            run=run,
            tokenizer=tokenizer,
            precision=loaded.precision,
            will_be_sharded=world.shards(recipe.training.data_parallel),
        )
        engine.set_mode(loaded, training=True)
        _train(trainer, recipe=recipe, run=run, reporter=reporter, resume_from=resume_from)
    weights = trainer.whole_weights()
    require_finite_adapter(weights, step=trainer.state.global_step)
    world.from_main(lambda: _save_adapter(trainer.model, weights=weights, tokenizer=tokenizer, directory=run.adapter))
    return TrainingResult(
        steps=trainer.state.global_step,
        seconds=trainer.seconds,
        num_tokens=trainer.count_real_tokens(),
        train_loss=_closing_loss(trainer),
        eval_loss_before=eval_loss_before,
        eval_loss_after=trainer.mean_eval_loss() if datasets.eval else None,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _train(
    trainer: TokenWeightedTrainer, *, recipe: Recipe, run: RunDir, reporter: Reporter, resume_from: Path | None
) -> None:
    """Run every step.

    Raises:
        TrainingStopped, TrainingInterrupted: as `train_adapter`.
    """
    section, world = recipe.training, trainer.world
    interrupt = InterruptCallback(max_minutes=section.max_minutes, world=world)
    metrics = MetricsCallback(
        run,
        reporter=reporter,
        count_tokens=trainer.count_real_tokens,
        count_seconds=lambda: trainer.seconds,
    )
    guard = GuardCallback(take_loss=trainer.take_step_loss, reporter=reporter, world=world)
    checkpoints = CheckpointCallback(run, every_minutes=section.save_every_minutes, world=world)
    for callback in (guard, metrics, checkpoints, interrupt):
        trainer.add_callback(callback)
    set_seed(section.seed + world.rank)  # else the processes would drop out the same
    folder = _position_here(resume_from, run=run, world=world) if resume_from is not None else None
    with interrupt.listening(reporter):
        trainer.train(resume_from_checkpoint=str(folder) if folder is not None else None)
    trainer.stop_clock()
    if interrupt.reason is not None:
        raise TrainingInterrupted(
            f"stopped by {interrupt.reason} after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            f"everything is saved",
            hint=None,
        )


def _position_here(checkpoint: Path, *, run: RunDir, world: World) -> Path:
    """A folder from which this process's Trainer reads its position: the checkpoint, or a folder with that file."""
    if world.size == 1:
        return checkpoint
    text = world.from_main(lambda: (checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    if world.is_main:
        return checkpoint
    folder = run.checkpoints / checkpoint.name
    folder.mkdir(parents=True)
    (folder / TRAINER_STATE).write_text(text, encoding="utf-8")
    return folder


def _settle_packing(
    loaded: LoadedModel,
    *,
    engine: Engine,
    tokenizer: Any,
    datasets: Datasets,
    recipe: Recipe,
    reporter: Reporter,
    world: World,
) -> int | None:
    """Tokens of a pack, or None when rows are not joined: nobody asked, or they would see each other here."""
    section = recipe.training
    if not section.packing:
        return None
    engine.set_mode(loaded, training=True)
    leaks = world.gather(
        find_leak(loaded, rows=datasets.train, pad_token_id=tokenizer.pad_token_id, batch_size=section.batch_size)
    )
    leak = next(filter(None, leaks), None)
    if leak is not None:
        reporter.warn(
            f"training.packing is set aside, and a batch holds {section.batch_size} padded rows instead of packs: "
            f"{leak}"
        )
        return None
    return recipe.tokens_per_pack


def _keep_packing(run: RunDir, *, packed: bool, resumes: bool) -> None:
    """Steps of packs and steps of rows are not the same steps: a run goes on as it began (F36)."""
    before = read_manifest(run).packed
    if resumes and before is not None and before != packed:
        ways = ("packed", "unpacked") if before else ("unpacked", "packed")
        raise RunError(
            f"{run.path} was trained {ways[0]} so far, and on this machine it would go on {ways[1]}",
            hint="resume it where it began, or start a new run without --resume",
        )
    update_manifest(run, packed=packed)


def _build(
    loaded: LoadedModel,
    *,
    tokenizer: Any,
    datasets: Datasets,
    recipe: Recipe,
    run: RunDir,
    pack_tokens: int | None,
    world: World,
) -> TokenWeightedTrainer:
    config = to_sft_config(
        recipe.training,
        evaluation=recipe.evaluation,
        logging=recipe.logging,
        precision=loaded.precision,
        run=run,
        on_cpu=loaded.model.device.type == "cpu",
        has_eval_rows=bool(datasets.eval),
        sharding=_sharding(loaded, recipe=recipe, world=world),
    )
    return build_trainer(
        loaded,
        config=config,
        tokenizer=tokenizer,
        train_rows=datasets.train,
        eval_rows=datasets.eval,
        section=recipe.training,
        pack_tokens=pack_tokens,
        run=run,
        world=world,
    )


def _sharding(loaded: LoadedModel, *, recipe: Recipe, world: World) -> dict[str, Any] | None:
    """Arguments of `TrainingArguments` that divide a training; None where every process holds all of it."""
    return fsdp_settings(loaded.model) if world.shards(recipe.training.data_parallel) else None


def _closing_loss(trainer: TokenWeightedTrainer) -> float:
    history = trainer.state.log_history
    # A run that stopped early before its first line has the Trainer's mean over all steps alone.
    losses = [row["loss"] for row in history if "loss" in row] or [history[-1]["train_loss"]]
    last = losses[-max(len(losses) // 10, 1) :]
    return float(sum(last) / len(last))


def _save_adapter(model: Any, *, weights: dict[str, torch.Tensor], tokenizer: Any, directory: Path) -> None:
    """Write the adapter with the tokenizer next to it; the directory appears when it is whole."""

    def explain(cause: Exception) -> Exception:
        if not isinstance(cause, OSError | SafetensorError):
            return cause
        return RunError(
            f"the adapter could not be saved into {directory}: {getattr(cause, 'strerror', None) or cause}",
            hint="make space, and resume with --resume: the last checkpoint holds everything",
        )

    # What is there already is of a run that was trained on after its end.
    with replaced_directory(directory, explain=explain) as partial:
        write_adapter(model, partial, weights=weights)
        tokenizer.save_pretrained(str(partial))
