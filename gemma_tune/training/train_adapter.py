"""One training: from a model with an adapter and encoded rows to a trained adapter on disk (LEAF)."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import set_seed

from gemma_tune.disk import replaced_directory
from gemma_tune.errors import RunError, TrainingInterrupted
from gemma_tune.machine.main_memory import peak_memory_bytes
from gemma_tune.models.directory import BASE_FILE
from gemma_tune.runs.checkpoints import set_aside
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest, update_manifest
from gemma_tune.training.adapter_weights import write_adapter
from gemma_tune.training.callbacks import CheckpointCallback, InterruptCallback, MetricsCallback
from gemma_tune.training.dry_run import rehearse
from gemma_tune.training.guards import GuardCallback, refuse_unchanged, require_finite_adapter, weights_sha256
from gemma_tune.training.leak_probe import find_leak
from gemma_tune.training.loop import Loop
from gemma_tune.training.methods.method import start_method
from gemma_tune.training.parts import TrainerParts
from gemma_tune.training.row_attention import attending_by_row
from gemma_tune.training.sealed_checkpoints import TRAINER_STATE
from gemma_tune.training.trackers import tracking


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to."""

    steps: int  # optimizer steps done
    seconds: float  # wall time of the training
    num_trainable: int  # trained parameters
    # real tokens trained on, padding left out. Steps, seconds and tokens count what was done before a resume as well.
    num_tokens: int
    train_loss: float  # mean loss of the last tenth of the logged steps, nats a supervised token
    # eval_loss_before, eval_loss_after: on the eval rows, nats a supervised token; None without eval rows
    eval_loss_before: float | None
    eval_loss_after: float | None
    peak_memory_bytes: int  # of the card on CUDA, of the process elsewhere


def train_adapter(
    parts: TrainerParts, *, resume_from: Path | None = None, describe: Callable[[Path], None] = lambda directory: None
) -> TrainingResult:
    """Train, and save the adapter with its tokenizer into `run.adapter`; every process of the world calls this.

    Args:
        resume_from: the checkpoint to continue from, on the disk of process 0.
        describe: puts further files next to the adapter, in process 0, before it bears its name.

    Raises:
        TrainingStopped: going on would ruin the run.
        TrainingInterrupted: a signal came, or the time is up; a checkpoint was saved.
        RunError: a run that was trained packed would continue unpacked, or the other way round; a checkpoint cannot be
            written or read.
    """
    loaded, engine, recipe = parts.loaded, parts.engine, parts.recipe
    run, world = parts.context.run, parts.context.world
    method = start_method(recipe)
    attending = attending_by_row(loaded) if recipe.training.packing else nullcontext()
    with attending, tracking(recipe.logging.trackers, run=run):
        parts = replace(parts, pack_tokens=_settle_packing(parts))
        packed = parts.pack_tokens is not None
        world.broadcast(lambda: _keep_packing(run, packed=packed, resumes=resume_from is not None))
        trainer = method.make_trainer(parts)
        engine.set_mode(loaded, training=True)
        eval_loss_before = rehearse(trainer, parts=parts)
        engine.set_mode(loaded, training=True)
        _train(trainer, parts, resume_from=resume_from)
    weights = trainer.whole_weights()
    require_finite_adapter(weights, step=trainer.state.global_step)
    world.broadcast(
        lambda: _save_adapter(
            trainer.model, weights=weights, tokenizer=parts.tokenizer, directory=run.adapter, describe=describe
        )
    )
    return TrainingResult(
        steps=trainer.state.global_step,
        seconds=trainer.seconds,
        num_trainable=sum(weight.numel() for weight in weights.values()),
        num_tokens=trainer.count_real_tokens(),
        train_loss=_closing_loss(trainer),
        eval_loss_before=eval_loss_before,
        eval_loss_after=trainer.mean_eval_loss() if parts.datasets.eval else None,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _train(trainer: Loop, parts: TrainerParts, *, resume_from: Path | None) -> None:
    """Run every step.

    Raises:
        TrainingStopped, TrainingInterrupted: as `train_adapter`.
    """
    section, context = parts.recipe.training, parts.context
    interrupt = InterruptCallback(context, max_minutes=section.max_minutes)
    metrics = MetricsCallback(
        context,
        method=parts.recipe.method_facts,
        count_tokens=trainer.count_real_tokens,
        count_seconds=lambda: trainer.seconds,
    )
    guard = GuardCallback(context, take_loss=trainer.take_step_loss)
    checkpoints = CheckpointCallback(context, every_minutes=section.save_every_minutes)
    for callback in (guard, metrics, checkpoints, interrupt):
        trainer.add_callback(callback)
    set_seed(section.seed + context.world.rank)  # else the processes would drop out the same
    folder = _position_here(resume_from, context) if resume_from is not None else None
    before = weights_sha256(trainer.model)
    with interrupt.listening():
        trainer.train(resume_from_checkpoint=str(folder) if folder is not None else None)
    trainer.stop_clock()
    if interrupt.reason is not None:
        raise TrainingInterrupted(
            f"stopped by {interrupt.reason} after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            f"everything is saved",
            hint=None,
        )
    if not any(context.world.all_gather(weights_sha256(trainer.model) != before)):
        refuse_unchanged(trainer.state, keeps_best=trainer.args.load_best_model_at_end, context=context)


def _position_here(checkpoint: Path, context: RunContext) -> Path:
    """A folder from which this process's Trainer reads its position: the checkpoint, or a folder with that file."""
    world = context.world
    if world.size == 1:
        return checkpoint
    text = world.broadcast(lambda: (checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    if world.is_main:
        return checkpoint
    folder = context.run.checkpoints / checkpoint.name
    folder.mkdir(parents=True)
    (folder / TRAINER_STATE).write_text(text, encoding="utf-8")
    return folder


def _settle_packing(parts: TrainerParts) -> int | None:
    """Return the tokens of a pack, or None when rows are not joined: nobody asked, or they would see each other."""
    section, loaded = parts.recipe.training, parts.loaded
    if not section.packing:
        return None
    parts.engine.set_mode(loaded, training=True)
    pad_token_id = parts.tokenizer.pad_token_id
    leaks = parts.context.world.all_gather(
        find_leak(loaded, rows=parts.datasets.train, pad_token_id=pad_token_id, batch_size=section.batch_size)
    )
    leak = next(filter(None, leaks), None)
    if leak is not None:
        parts.context.reporter.warn(
            f"training.packing is set aside, and a batch holds {section.batch_size} padded rows instead of packs: "
            f"{leak}"
        )
        return None
    return parts.recipe.tokens_per_pack


def _keep_packing(run: RunDir, *, packed: bool, resumes: bool) -> None:
    """Steps of packs and steps of rows are not the same steps: a run is resumed as it began (F36)."""
    before = read_manifest(run).packed
    if resumes and before is not None and before != packed:
        ways = ("packed", "unpacked") if before else ("unpacked", "packed")
        raise RunError(
            f"{run.path} was trained {ways[0]} so far, and on this machine it would continue {ways[1]}",
            hint="resume it where it began, or start a new run without --resume",
        )
    update_manifest(run, packed=packed)


def _closing_loss(trainer: Loop) -> float:
    history = trainer.state.log_history
    # A run that stopped early before its first line has the Trainer's mean over all steps alone.
    losses = [row["loss"] for row in history if "loss" in row] or [history[-1]["train_loss"]]
    last = losses[-max(len(losses) // 10, 1) :]
    return float(sum(last) / len(last))


def _save_adapter(
    model: Any, *, weights: dict[str, torch.Tensor], tokenizer: Any, directory: Path, describe: Callable[[Path], None]
) -> None:
    """Write the adapter with what stands next to it; the directory appears when it is whole."""

    def explain(cause: Exception) -> Exception:
        if not isinstance(cause, OSError | SafetensorError):
            return cause
        return RunError(
            f"the adapter could not be saved into {directory}: {getattr(cause, 'strerror', None) or cause}",
            hint="make space, and resume with --resume: the last checkpoint holds everything",
        )

    # What is there already is of a run that was trained on after its end; or somebody put it there.
    displace = None if (directory / BASE_FILE).is_file() else set_aside
    with replaced_directory(directory, explain=explain, displace=displace) as partial:
        write_adapter(model, partial, weights=weights)
        tokenizer.save_pretrained(str(partial))
        describe(partial)
