"""One training: from a model with an adapter and encoded rows to a trained adapter on disk (LEAF)."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from gemma_tune.data.encode import Datasets
from gemma_tune.engines.base import Engine, LoadedModel
from gemma_tune.errors import RunError, TrainingInterrupted
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import read_manifest, update_manifest
from gemma_tune.runs.reporter import Reporter
from gemma_tune.training.callbacks import (
    CheckpointCallback,
    GuardCallback,
    InterruptCallback,
    MetricsCallback,
    peak_memory_bytes,
)
from gemma_tune.training.leak_probe import find_leak
from gemma_tune.training.row_attention import attending_by_row
from gemma_tune.training.trainer import TokenWeightedTrainer, build_trainer, to_sft_config


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        steps: optimizer steps done, those before a resume included.
        seconds: wall time of the steps done in this process.
        num_tokens: real tokens trained on in this process, padding left out.
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
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train, and save the adapter with its tokenizer into `run.adapter`.

    Raises:
        TrainingStopped: going on would ruin the run.
        TrainingInterrupted: a signal came; a checkpoint was saved.
        RunError: a run that was trained packed would go on unpacked, or the other way round.
    """
    with attending_by_row(loaded) if recipe.training.packing else nullcontext():
        pack_tokens = _settle_packing(
            loaded, engine=engine, tokenizer=tokenizer, datasets=datasets, recipe=recipe, reporter=reporter
        )
        _keep_packing(run, packed=pack_tokens is not None, resumes=resume_from is not None)
        trainer = _build(
            loaded, tokenizer=tokenizer, datasets=datasets, recipe=recipe, run=run, pack_tokens=pack_tokens
        )
        eval_loss_before = trainer.mean_eval_loss() if datasets.eval else None
        engine.set_mode(loaded, training=True)
        seconds = _train(trainer, run=run, seed=recipe.training.seed, reporter=reporter, resume_from=resume_from)
    save_adapter(loaded, tokenizer=tokenizer, directory=run.adapter, base_name=base_name, base_revision=base_revision)
    return TrainingResult(
        steps=trainer.state.global_step,
        seconds=seconds,
        num_tokens=trainer.num_real_tokens,
        train_loss=_closing_loss(trainer),
        eval_loss_before=eval_loss_before,
        eval_loss_after=trainer.mean_eval_loss() if datasets.eval else None,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _train(
    trainer: TokenWeightedTrainer, *, run: RunDir, seed: int, reporter: Reporter, resume_from: Path | None
) -> float:
    """Run every step; returns seconds of wall time.

    Raises:
        TrainingStopped, TrainingInterrupted: as `train_adapter`.
    """
    interrupt = InterruptCallback()
    metrics = MetricsCallback(run, reporter=reporter, count_tokens=lambda: trainer.num_real_tokens)
    for callback in (GuardCallback(), metrics, CheckpointCallback(run), interrupt):
        trainer.add_callback(callback)
    set_seed(seed)
    started = time.monotonic()
    with interrupt.listening(reporter):
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    seconds = time.monotonic() - started
    if interrupt.signal is not None:
        raise TrainingInterrupted(
            f"stopped by {interrupt.signal.name} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; everything is saved",
            hint=None,
        )
    return seconds


def _settle_packing(
    loaded: LoadedModel, *, engine: Engine, tokenizer: Any, datasets: Datasets, recipe: Recipe, reporter: Reporter
) -> int | None:
    """Tokens of a pack, or None when rows are not joined: nobody asked, or they would see each other here."""
    section = recipe.training
    if not section.packing:
        return None
    engine.set_mode(loaded, training=True)
    leak = find_leak(loaded, rows=datasets.train, pad_token_id=tokenizer.pad_token_id, batch_size=section.batch_size)
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
) -> TokenWeightedTrainer:
    config = to_sft_config(
        recipe.training,
        evaluation=recipe.evaluation,
        logging=recipe.logging,
        precision=loaded.precision,
        run=run,
        on_cpu=loaded.model.device.type == "cpu",
        has_eval_rows=bool(datasets.eval),
    )
    return build_trainer(
        loaded,
        config=config,
        tokenizer=tokenizer,
        train_rows=datasets.train,
        eval_rows=datasets.eval,
        section=recipe.training,
        pack_tokens=pack_tokens,
        callbacks=(),
    )


def _closing_loss(trainer: TokenWeightedTrainer) -> float:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    last = losses[-max(len(losses) // 10, 1) :]
    return float(sum(last) / len(last))


def save_adapter(
    loaded: LoadedModel, *, tokenizer: Any, directory: Path, base_name: str, base_revision: str | None
) -> None:
    """Write the adapter in PEFT's format, with the tokenizer beside it.

    The embedding is saved only when it was trained: PEFT's `auto` asks the hub whether the vocabulary changed (F6). The
    adapter names its base as the recipe does, not by the directory it was loaded from (S5, F44).
    """
    model = loaded.model
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
        config.revision = base_revision
    trains_embedding = any("embed_tokens" in (config.modules_to_save or ()) for config in model.peft_config.values())
    model.save_pretrained(str(directory), save_embedding_layers=trains_embedding, safe_serialization=True)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    tokenizer.save_pretrained(str(directory))
