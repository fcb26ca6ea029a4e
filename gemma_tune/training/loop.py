"""TRL's `SFTTrainer`, fed with our own token ids and labels (LEAF; the only file that knows TRL's names).

Import it after the engine has started: Unsloth replaces `trl.SFTTrainer` when it is imported.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from gemma_tune.data.encode.arrays import EncodedRows
from gemma_tune.errors import TrainingStopped
from gemma_tune.training.adapter_weights import trained_weights
from gemma_tune.training.callbacks import EarlyStopCallback
from gemma_tune.training.guards import likely_cause
from gemma_tune.training.layouts import JoinRows, PadRight, RowGroups, join_rows_for, pad_right_for
from gemma_tune.training.methods.method import LossSums, Method
from gemma_tune.training.parts import TrainerParts
from gemma_tune.training.sampler import EpochSampler
from gemma_tune.training.sealed_checkpoints import OwnCheckpoints
from gemma_tune.training.sharding import fsdp_settings, shard_on_processors

_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
# Above this the head is computed in chunks, as TRL does; a few buffers of this size live at once.
_MAX_WHOLE_LOGITS_BYTES = 256 * 2**20


def to_sft_config(parts: TrainerParts) -> SFTConfig:
    """Translate the recipe into TRL's configuration."""
    recipe, model = parts.recipe, parts.loaded.model
    section, evaluation, precision = recipe.training, recipe.evaluation, parts.loaded.precision
    watch = recipe.method_facts.watch
    on_cpu = model.device.type == "cpu"
    evaluates = bool(parts.datasets.eval) and evaluation.every_steps is not None
    # The best adapter can only be kept when every evaluation has its checkpoint.
    save_steps: float = section.save_every_steps or 0.1
    if section.early_stop_patience and evaluation.every_steps:
        save_steps = evaluation.every_steps
    config = SFTConfig(
        output_dir=str(parts.context.run.checkpoints),
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=evaluation.batch_size or section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_steps=section.warmup_fraction,  # below 1: a share of the run
        lr_scheduler_type=section.schedule,
        optim=_OPTIMIZERS[section.optimizer],
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        max_grad_norm=section.max_grad_norm,
        neftune_noise_alpha=section.neftune_alpha,
        gradient_checkpointing=section.gradient_checkpointing != "off",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=section.seed,
        data_seed=section.seed,
        bf16=precision.autocast == "bf16",
        fp16=precision.autocast == "fp16",
        use_cpu=on_cpu,
        logging_steps=recipe.logging.every_steps,
        logging_nan_inf_filter=False,  # with it a NaN run logs loss 0.0 to its end (F24)
        report_to=list(recipe.logging.trackers) or "none",
        disable_tqdm=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=evaluation.every_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=section.keep_checkpoints,
        load_best_model_at_end=section.early_stop_patience is not None and evaluates,
        metric_for_best_model=f"eval_{watch.name}",
        greater_is_better=watch.better == "higher",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,  # lengths were settled, and shown, when the rows were encoded
        dataloader_pin_memory=not on_cpu,
        **(fsdp_settings(model) if parts.shards_model else {}),
    )
    if on_cpu and config.fsdp:
        shard_on_processors(config)
    return config


class Loop(OwnCheckpoints, SFTTrainer):
    """`SFTTrainer` with a method's loss, which counts real tokens and keeps its own checkpoints.

    TRL averages the eval loss over batches, so that its value depends on the batch size; here sums are added.
    """

    takes_head_targets = False  # whether `compute_loss` knows what `JoinRows` adds for it
    method: Method
    row_order: EpochSampler
    eval_rows: EncodedRows
    pad_right: PadRight
    _step_loss = torch.tensor(0.0)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.row_order

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # accelerate hands the epoch on through so many wrappers, and where several processes resume there is one more.
        self.row_order.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_real_tokens += inputs.pop("num_tokens")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # A share of the steps is rounded up, and in the last step of a warm-up the rate is not yet what was asked for:
        # of one step nothing would be left.
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = num_training_steps - 1
        return super().create_scheduler(num_training_steps, optimizer)

    def take_step_loss(self) -> torch.Tensor:
        """The loss of this process's forward passes since the last call, a scalar in nats a supervised token."""
        loss, self._step_loss = self._step_loss, torch.zeros_like(self._step_loss)
        return loss

    def longest_batch(self) -> dict[str, Any]:
        """The batch of the longest sequences, which needs the most memory."""
        groups = self.row_order.longest(self.args.per_device_train_batch_size)
        batch: dict[str, Any] = self.data_collator([self.train_dataset[group] for group in groups])
        del batch["num_tokens"]
        return batch

    @property
    def forward_model(self) -> Any:
        """The model to call: in training that which its processes have wrapped, so that their gradients meet."""
        return self.model_wrapped if self.model.training else self.model

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the method; the Trainer calls this for every forward pass."""
        loss = self.mean_of_step(self.method.loss_of(self, inputs), num_items_in_batch).float()
        return (loss, None) if return_outputs else loss

    def trl_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL's `compute_loss` does."""
        return super().compute_loss(*args, **kwargs)

    def mean_of_step(self, sums: LossSums, num_items_in_batch: torch.Tensor | int | None) -> Any:
        """Divide by what the forward passes of a step count in all processes, where the Trainer has counted it."""
        if num_items_in_batch is None:
            return sums.total / sums.count
        mean = sums.total / num_items_in_batch
        # As Trainer.compute_loss: gradients are averaged over the processes.
        return mean * self.accelerator.num_processes if self.args.average_tokens_across_devices else mean

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_loss": self.mean_eval_loss()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mean_eval_loss(self) -> float:
        """Return the method's loss over all eval rows, such as nats a supervised token; a collective call.

        Raises:
            TrainingStopped: it is not finite.
        """
        was_training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch, counts in self._eval_batches():
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    sums = self.method.loss_of(self, batch)
                if counts:
                    total, count = total + float(sums.total), count + sums.count
        self.model.train(was_training)
        total, all_counted = self.world.all_reduce(total, count)
        if not math.isfinite(total):
            raise TrainingStopped(
                f"after step {self.state.global_step} the loss of the eval rows is {total / all_counted:g}",
                hint=likely_cause(self.model, float16=self.args.fp16, learning_rate=self.args.learning_rate),
            )
        return total / all_counted

    def _eval_batches(self) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        """Padded batches of this process, and whether they count.

        The longest rows come first: little padding, and too little memory shows at once. All processes get as many
        batches, as a sharded model computes in all of them or in none; one that is there twice counts once.
        """
        order = np.argsort(-self.eval_rows.lengths, kind="stable").tolist()
        size: int = self.args.eval_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        for first in range(0, len(batches), self.world.size):
            number = first + self.world.rank
            counts = number < len(batches)
            rows = batches[number if counts else first]
            batch = self.method.collate([[self.eval_rows.arrays(row)] for row in rows], self.pad_right)
            del batch["num_tokens"]
            yield batch, counts


def build_loop(parts: TrainerParts, method: Method, *, kind: type[Loop] = Loop) -> Loop:
    """Build a trainer over ready-made rows.

    The adapter's weights come out as they went in: TRL casts those of a quantised model to bfloat16, in which updates
    below 1/256 of a weight are lost, so they are put back in float32 before the optimizer sees them.

    Args:
        kind: the class of the trainer, where the method has one of its own.
    """
    section, datasets, world = parts.recipe.training, parts.datasets, parts.context.world
    model, tokenizer = parts.loaded.model, parts.tokenizer
    config = to_sft_config(parts)
    weights = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    patience = section.early_stop_patience if datasets.eval else None
    early_stop = EarlyStopCallback(patience, watch=parts.recipe.method_facts.watch) if patience else None
    pad_right = pad_right_for(parts.loaded, pad_token_id=tokenizer.pad_token_id)
    # SFTTrainer, Unsloth's patch of it included, wants a `datasets.Dataset`, but only looks at its columns and first
    # row; every later use goes through `trainer.train_dataset` and our own sampler. So it is shown one row and then
    # given the rows where they are: a Dataset of them all would copy every token into Arrow, and one of row numbers
    # with a transform cannot be indexed by a pack and goes through Arrow for every batch.
    first = datasets.train[0]
    sample = Dataset.from_dict({"input_ids": [first.input_ids], "labels": [first.labels]})
    trainer = kind(
        model=model,
        args=config,
        train_dataset=sample,
        eval_dataset=sample if datasets.eval else None,
        data_collator=partial(method.collate, layout=_layout_of(parts, kind) or pad_right),
        processing_class=tokenizer,
        callbacks=[early_stop] if early_stop else [],
    )
    trainer.method = method
    trainer.run = parts.context.run
    trainer.world = world
    trainer.early_stop = early_stop
    trainer.train_dataset = RowGroups(datasets.train)
    trainer.eval_rows = datasets.eval
    trainer.pad_right = pad_right
    trainer.row_order = EpochSampler(
        datasets.train.lengths,
        batch_size=section.batch_size,
        seed=section.seed,
        group_by_length=section.group_by_length,
        pack_tokens=parts.pack_tokens,
        num_processes=world.size,
    )
    for name, weight in model.named_parameters():
        if name in weights:
            weight.data = weights[name]
    return trainer


def _layout_of(parts: TrainerParts, kind: type[Loop]) -> JoinRows | None:
    """How packs are laid out; None where rows are padded one by one."""
    if parts.pack_tokens is None:
        return None
    join_rows = join_rows_for(parts.loaded, pad_token_id=parts.tokenizer.pad_token_id)
    vocab_size = parts.loaded.model.config.get_text_config().vocab_size
    logits_bytes = 4 * parts.pack_tokens * parts.recipe.training.batch_size * vocab_size
    on_cpu = parts.loaded.model.device.type == "cpu"
    fits = kind.takes_head_targets and join_rows.in_one_sequence and on_cpu and logits_bytes <= _MAX_WHOLE_LOGITS_BYTES
    return replace(join_rows, with_head_targets=fits)
