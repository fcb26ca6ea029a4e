"""TRL's `SFTTrainer`, fed with our own token ids and labels (LEAF; the only file that knows TRL's names).

Import it after the engine has started: Unsloth replaces `trl.SFTTrainer` when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from gemma_tune.data.encode.arrays import IGNORED, EncodedRows
from gemma_tune.engines.base import LoadedModel
from gemma_tune.engines.facts import ENGINES
from gemma_tune.machine.precision import Precision
from gemma_tune.machine.world import ALONE, World
from gemma_tune.recipe.schema import EvaluationSection, LoggingSection, TrainingSection
from gemma_tune.runs.layout import RunDir
from gemma_tune.training.adapter_weights import trained_weights
from gemma_tune.training.callbacks import EarlyStopCallback
from gemma_tune.training.row_attention import ROW_ATTENTION
from gemma_tune.training.sampler import EpochSampler, Group
from gemma_tune.training.sealed_checkpoints import OwnCheckpoints
from gemma_tune.training.sharding import shard_on_processors

RowArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # token ids and supervised flags of one row

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


def to_sft_config(
    section: TrainingSection,
    *,
    evaluation: EvaluationSection,
    logging: LoggingSection,
    precision: Precision,
    run: RunDir,
    on_cpu: bool,
    has_eval_rows: bool,
    sharding: dict[str, Any] | None = None,
) -> SFTConfig:
    """Translate the recipe's sections into TRL's configuration.

    Args:
        sharding: what `fsdp_settings` returned.
    """
    evaluates = has_eval_rows and evaluation.every_steps is not None
    # The best adapter can only be kept when every evaluation has its checkpoint.
    save_steps: float = section.save_every_steps or 0.1
    if section.early_stop_patience and evaluation.every_steps:
        save_steps = evaluation.every_steps
    config = SFTConfig(
        output_dir=str(run.checkpoints),
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
        logging_steps=logging.every_steps,
        logging_nan_inf_filter=False,  # with it a NaN run logs loss 0.0 to its end (F24)
        report_to=list(logging.trackers) or "none",
        disable_tqdm=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=evaluation.every_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=section.keep_checkpoints,
        load_best_model_at_end=section.early_stop_patience is not None and evaluates,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,  # lengths were settled, and shown, when the rows were encoded
        dataloader_pin_memory=not on_cpu,
        **(sharding or {}),
    )
    if on_cpu and config.fsdp:
        shard_on_processors(config)
    return config


class RowGroups(torch.utils.data.Dataset[list[RowArrays]]):
    """The rows of a group, as views of the flat arrays."""

    def __init__(self, rows: EncodedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, group: Group) -> list[RowArrays]:
        return [self.rows.arrays(row) for row in group]


@dataclass(frozen=True)
class PadRight:
    """Collate groups of one row into right-padded tensors.

    Returns `input_ids`, `attention_mask` and `labels`, each [batch, longest row], and `num_tokens`, the count of tokens
    that are not padding. Padding is masked by the attention mask and has label -100 whatever its id is, so a pad token
    that equals the stop token masks nothing else (F14). Without rows the batch is one token that nothing is learned
    from.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, groups: Sequence[Sequence[RowArrays]]) -> dict[str, Any]:
        rows = [row for group in groups for row in group]
        width = _round_up(max((len(ids) for ids, _ in rows), default=1), self.pad_to_multiple_of)
        input_ids = np.full((max(len(rows), 1), width), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        attention_mask = np.zeros_like(input_ids)
        attention_mask[:, 0] = 1  # a row that attends to nothing has no numbers
        for index, (ids, supervised) in enumerate(rows):
            input_ids[index, : len(ids)] = ids
            labels[index, : len(ids)] = np.where(supervised, ids, IGNORED)
            attention_mask[index, : len(ids)] = 1
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "num_tokens": sum(len(ids) for ids, _ in rows),
        }


@dataclass(frozen=True)
class JoinRows:
    """Collate packs into sequences in which each row sees only itself.

    Returns `input_ids`, `labels` and `position_ids`, each [packs, longest pack], and `num_tokens`, the count of tokens
    that are not padding. Positions restart at 0 with every row, and every padding token has
    position 0. There is no attention mask: from restarting positions without one the attention code finds the borders
    of the rows, and a mask of ones silently switches that off. The first token of a row has label -100, because what
    predicts it is the last token of another row.

    Attributes:
        pad_token_id: fills what a shorter pack leaves of the batch; its label is -100.
        pad_to_multiple_of: the length of the batch is a multiple of this.
        in_one_sequence: put all packs of a batch behind one another, [1, tokens of the batch].
        with_row_lengths: add `packed_seq_lengths`, the tokens of each row in order, int32 [rows]; only beside
            `in_one_sequence`.
        with_head_targets: add `logits_to_keep`, the positions that predict a supervised token, and `head_targets`,
            those tokens, both int64 [supervised tokens]; only beside `in_one_sequence`.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    in_one_sequence: bool = False
    with_row_lengths: bool = False
    with_head_targets: bool = False

    def __call__(self, packs: Sequence[Sequence[RowArrays]]) -> dict[str, Any]:
        sequences = [[row for pack in packs for row in pack]] if self.in_one_sequence else packs
        num_tokens = [sum(len(ids) for ids, _ in sequence) for sequence in sequences]
        width = _round_up(max(*num_tokens, 1), self.pad_to_multiple_of)
        input_ids = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        position_ids = np.zeros_like(input_ids)
        for index, sequence in enumerate(sequences):
            start = 0
            for ids, supervised in sequence:
                stop = start + len(ids)
                input_ids[index, start:stop] = ids
                labels[index, start + 1 : stop] = np.where(supervised, ids, IGNORED)[1:]
                position_ids[index, start:stop] = np.arange(len(ids))
                start = stop
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "num_tokens": sum(num_tokens),
        }
        if self.with_row_lengths:
            lengths = [len(ids) for sequence in sequences for ids, _ in sequence]
            batch["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        if self.with_head_targets:
            targets = np.flatnonzero(labels[0] != IGNORED)
            batch["logits_to_keep"] = torch.from_numpy(targets - 1)
            batch["head_targets"] = torch.from_numpy(labels[0, targets])
        return batch


def join_rows_for(loaded: LoadedModel, *, pad_token_id: int) -> JoinRows:
    """The layout in which a model's attention keeps joined rows apart.

    transformers' SDPA masks find the borders in each sequence of a batch, and cost less there than in one long
    sequence. `row_attention` finds them in one sequence, which costs no more than its rows. transformers' flash
    attention, and Unsloth's own forward pass on CUDA, look for them in a batch of one sequence only and would let rows
    see each other in a larger one. Unsloth also takes the row lengths, which saves it reading positions back from the
    card, and lets the sequence be longer than the `max_seq_length` of the load.
    """
    on_cuda = loaded.model.device.type == "cuda"
    own_forward = on_cuda and ENGINES[loaded.engine].has_own_forward
    attention = getattr(loaded.model.config, "_attn_implementation", None) or ""
    return JoinRows(
        pad_token_id,
        pad_to_multiple_of=_pad_multiple(on_cuda=on_cuda),
        in_one_sequence=own_forward or "flash" in attention or attention == ROW_ATTENTION,
        with_row_lengths=own_forward,
    )


def pad_right_for(loaded: LoadedModel, *, pad_token_id: int) -> PadRight:
    """Padding to the length that a model's device is fast with."""
    return PadRight(pad_token_id, pad_to_multiple_of=_pad_multiple(on_cuda=loaded.model.device.type == "cuda"))


def _pad_multiple(*, on_cuda: bool) -> int:
    return 8 if on_cuda else 1  # the tensor cores' tiles


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


class TokenWeightedTrainer(OwnCheckpoints, SFTTrainer):
    """`SFTTrainer` that counts real tokens, weights the eval loss by supervised token, and keeps its own checkpoints.

    TRL averages the eval loss over batches, so that its value depends on the batch size.
    """

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

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss; where the batch says which logits are needed, the same loss from those alone, in one piece.

        TRL computes the head in checkpointed chunks of tokens, for a vocabulary of 256,000 and a small card, and its
        entropy and accuracy along. Where the logits are small that costs a third of a step.
        """
        if "head_targets" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["head_targets"]
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in ("labels", "head_targets")}, use_cache=False
        )
        logits_SV = outputs.logits.flatten(0, 1).float()  # a view: indexing would copy the gradient
        loss = torch.nn.functional.cross_entropy(logits_SV, targets, reduction="sum") / (
            num_items_in_batch if num_items_in_batch is not None else len(targets)
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as Trainer.compute_loss: gradients are averaged over them
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_loss": self.mean_eval_loss()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mean_eval_loss(self) -> float:
        """Cross-entropy over every supervised token of the eval rows, in nats a token; a collective call."""
        was_training = self.model.training
        self.model.eval()
        total, num_tokens = 0.0, 0
        with torch.no_grad():
            for batch, counts in self._eval_batches():
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    loss = self.model(**batch, use_cache=False).loss
                count = int((batch["labels"][:, 1:] != IGNORED).sum()) if counts else 0
                total += float(loss) * count
                num_tokens += count
        self.model.train(was_training)
        total, all_tokens = self.world.sum(total, num_tokens)
        return total / all_tokens

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
            batch = self.pad_right([[self.eval_rows.arrays(row)] for row in batches[number if counts else first]])
            del batch["num_tokens"]
            yield batch, counts


def build_trainer(
    loaded: LoadedModel,
    *,
    config: SFTConfig,
    tokenizer: Any,
    train_rows: EncodedRows,
    eval_rows: EncodedRows,
    section: TrainingSection,
    pack_tokens: int | None,
    run: RunDir,
    world: World = ALONE,
) -> TokenWeightedTrainer:
    """A trainer over ready-made rows.

    The adapter's weights come out as they went in: TRL casts those of a quantised model to bfloat16, in which updates
    below 1/256 of a weight are lost, so they are put back in float32 before the optimizer sees them.

    Args:
        pack_tokens: length of the packs that rows are joined into; None pads each row on its own.
    """
    model = loaded.model
    weights = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    patience = section.early_stop_patience if eval_rows else None
    early_stop = EarlyStopCallback(patience) if patience else None
    pad_right = pad_right_for(loaded, pad_token_id=tokenizer.pad_token_id)
    join_rows = join_rows_for(loaded, pad_token_id=tokenizer.pad_token_id)
    if pack_tokens is not None and join_rows.in_one_sequence:
        logits_bytes = 4 * pack_tokens * section.batch_size * model.config.get_text_config().vocab_size
        join_rows = replace(join_rows, with_head_targets=config.use_cpu and logits_bytes <= _MAX_WHOLE_LOGITS_BYTES)
    # SFTTrainer, Unsloth's patch of it included, wants a `datasets.Dataset`, but only looks at its columns and first
    # row; every later use goes through `trainer.train_dataset` and our own sampler. So it is shown one row and then
    # given the rows where they are: a Dataset of them all would copy every token into Arrow, and one of row numbers
    # with a transform cannot be indexed by a pack and goes through Arrow for every batch.
    sample = Dataset.from_dict({"input_ids": [train_rows[0].input_ids], "labels": [train_rows[0].labels]})
    trainer = TokenWeightedTrainer(
        model=model,
        args=config,
        train_dataset=sample,
        eval_dataset=sample if eval_rows else None,
        data_collator=pad_right if pack_tokens is None else join_rows,
        processing_class=tokenizer,
        callbacks=[early_stop] if early_stop else [],
    )
    trainer.run = run
    trainer.world = world
    trainer.early_stop = early_stop
    trainer.train_dataset = RowGroups(train_rows)
    trainer.eval_rows = eval_rows
    trainer.pad_right = pad_right
    trainer.row_order = EpochSampler(
        train_rows.lengths,
        batch_size=section.batch_size,
        seed=section.seed,
        group_by_length=section.group_by_length,
        pack_tokens=pack_tokens,
        num_processes=world.size,
    )
    for name, weight in model.named_parameters():
        if name in weights:
            weight.data = weights[name]
    return trainer
