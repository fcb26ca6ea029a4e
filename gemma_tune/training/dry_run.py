"""What would otherwise fail after hours is tried before the first step (LEAF; F10, F39, F40)."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState

from gemma_tune.disk import reason_of, sync_tree
from gemma_tune.errors import RunError, TrainingStopped
from gemma_tune.machine.precision import Precision
from gemma_tune.runs.checkpoints import require_free
from gemma_tune.runs.layout import RunDir
from gemma_tune.training.adapter_weights import read_adapter, trained_weights, write_adapter
from gemma_tune.training.guards import likely_cause
from gemma_tune.training.leak_probe import leaving_no_trace
from gemma_tune.training.loop import Loop
from gemma_tune.training.parts import TrainerParts

# The weight and AdamW's two moments in float32; other optimizers keep less.
_CHECKPOINT_BYTES_PER_WEIGHT = 12


def rehearse(trainer: Loop, *, parts: TrainerParts) -> float | None:
    """Save and reload the adapter, then evaluate and train on the longest rows; nothing of it stays.

    The longest rows come first so that too little memory, or a base that is not finite, shows within seconds. A model
    that will be sharded trains on them when it is.

    Returns:
        The eval loss before training in nats a supervised token, or None without eval rows.

    Raises:
        RunError: the disk has no room for the checkpoints of the run, or what is saved does not come back equal.
        TrainingStopped: the memory does not suffice, or the loss is not finite.
    """
    num_weights = sum(weight.numel() for weight in trained_weights(trainer.model).values())
    kept = (trainer.args.save_total_limit or 1) + 1  # an old one goes after the new one is there
    run, precision = parts.context.run, parts.loaded.precision
    require_free(run.path, kept * _CHECKPOINT_BYTES_PER_WEIGHT * num_weights, what=f"{kept} checkpoints")
    _rehearse_saving(trainer.model, run=run, tokenizer=parts.tokenizer)
    with _explaining_memory(trainer):
        if parts.shards_model:
            trainer.add_callback(_RehearseStep(trainer, precision=precision))
        else:
            _rehearse_step(trainer, precision=precision)
        return trainer.mean_eval_loss() if trainer.eval_rows else None


@contextmanager
def _explaining_memory(trainer: Loop) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingStopped(
            f"the card has too little memory for {trainer.args.per_device_train_batch_size} of the longest sequences, "
            f"{trainer.longest_batch()['input_ids'].numel():,} tokens",
            hint="halve training.batch_size and double training.gradient_accumulation, set "
            "training.gradient_checkpointing=unsloth, or lower data.max_seq_tokens",
        ) from None


def _rehearse_saving(model: Any, *, run: RunDir, tokenizer: Any) -> None:
    """Write, flush, rename and read back, where and as a checkpoint will be."""
    before = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    parent = run.checkpoints if run.checkpoints.is_dir() else run.path
    folder, partial = parent / ".rehearsal", parent / ".rehearsal.partial"
    fault, hint = "cannot be saved", "make space, lift the quota or the limit of a file's size, or set run.output_dir"
    try:
        for path in (folder, partial):
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir()
        write_adapter(model, partial)
        tokenizer.save_pretrained(str(partial))
        sync_tree(partial)
        fault, hint = "cannot be renamed once it is whole", "its file system may not do that: set run.output_dir"
        partial.rename(folder)
        read_adapter(model, folder)
    except Exception as cause:
        # The tokenizers library has no exception of its own.
        if not isinstance(cause, OSError | SafetensorError) and type(cause) is not Exception:
            raise
        reason = reason_of(cause) if isinstance(cause, OSError) else cause
        raise RunError(f"a checkpoint in {parent} {fault}: {reason}", hint=f"{hint} to a folder elsewhere") from None
    finally:
        for path in (folder, partial):
            shutil.rmtree(path, ignore_errors=True)
    changed = [name for name, weight in trained_weights(model).items() if not torch.equal(weight, before[name])]
    if changed:
        raise RunError(f"the adapter's weight {changed[0]} does not come back as it was saved", hint="report this")


def _rehearse_step(trainer: Loop, *, precision: Precision) -> None:
    model = trainer.model
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.autocast or "")
    with leaving_no_trace(model):
        batch = trainer._prepare_inputs(trainer.longest_batch())
        with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            loss = trainer.compute_loss(model, batch)
        loss.backward()
        idle = any(weight.grad is None for weight in trained_weights(model).values())
    if not math.isfinite(float(loss.detach())):
        raise TrainingStopped(
            f"before the first step the loss of the longest rows is {float(loss.detach()):g}",
            hint=likely_cause(model, float16=autocast is torch.float16, learning_rate=trainer.args.learning_rate),
        )
    # DDP looks for weights without a gradient only where there are any: it walks through the graph at every step.
    trainer.accelerator.ddp_handler.find_unused_parameters = idle


class _RehearseStep(TrainerCallback):
    """`_rehearse_step` when the model is sharded, which is when the training begins."""

    def __init__(self, trainer: Loop, *, precision: Precision) -> None:
        self.trainer = trainer
        self.precision = precision

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with _explaining_memory(self.trainer):
            _rehearse_step(self.trainer, precision=self.precision)
