"""TRL's `SFTTrainer`, fed with our own token ids and labels (LEAF; the only file that knows TRL's names).

Import it after the engine has started: Unsloth replaces `trl.SFTTrainer` when it is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from gemma_tune.data.tokenize import IGNORED, EncodedRow
from gemma_tune.engines.base import LoadedModel
from gemma_tune.engines.precision import Precision
from gemma_tune.recipe.schema import EvaluationSection, LoggingSection, TrainingSection
from gemma_tune.runs.layout import RunDir
from gemma_tune.training.sampler import EpochSampler

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


def to_sft_config(
    section: TrainingSection,
    *,
    evaluation: EvaluationSection,
    logging: LoggingSection,
    precision: Precision,
    run: RunDir,
    on_cpu: bool,
    has_eval_rows: bool,
) -> SFTConfig:
    """Translate the recipe's sections into TRL's configuration."""
    evaluates = has_eval_rows and evaluation.every_steps is not None
    # The best adapter can only be kept when every evaluation has its checkpoint.
    save_steps: float = section.save_every_steps or 0.1
    if section.early_stop_patience and evaluation.every_steps:
        save_steps = evaluation.every_steps
    return SFTConfig(
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
    )


@dataclass(frozen=True)
class PadRight:
    """Collate encoded rows into right-padded tensors.

    Returns `input_ids`, `attention_mask` and `labels`, each [batch, longest row]. Padding is masked by the attention
    mask and has label -100 whatever its id is, so a pad token that equals the stop token masks nothing else (F14).
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORED)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            attention_mask[index, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class TokenWeightedTrainer(SFTTrainer):
    """`SFTTrainer` that counts real tokens and weights the eval loss by supervised token.

    TRL averages the eval loss over batches, so that its value depends on the batch size.
    """

    num_real_tokens = 0
    row_order: EpochSampler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return self.row_order

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_real_tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_loss": self.mean_eval_loss()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mean_eval_loss(self) -> float:
        """Cross-entropy over every supervised token of the eval rows, in nats a token."""
        was_training = self.model.training
        self.model.eval()
        total, num_tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    loss = self.model(**batch, use_cache=False).loss
                count = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(loss) * count
                num_tokens += count
        self.model.train(was_training)
        return total / num_tokens


def build_trainer(
    loaded: LoadedModel,
    *,
    config: SFTConfig,
    tokenizer: Any,
    train_rows: Sequence[EncodedRow],
    eval_rows: Sequence[EncodedRow],
    section: TrainingSection,
    callbacks: Sequence[TrainerCallback],
) -> TokenWeightedTrainer:
    """A trainer over ready-made rows.

    The adapter's weights come out as they went in: TRL casts those of a quantised model to bfloat16, in which updates
    below 1/256 of a weight are lost, so they are put back in float32 before the optimizer sees them.
    """
    model = loaded.model
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    patience = section.early_stop_patience if eval_rows else None
    stop = [EarlyStoppingCallback(patience)] if patience else []
    trainer = TokenWeightedTrainer(
        model=model,
        args=config,
        train_dataset=_to_dataset(train_rows),
        eval_dataset=_to_dataset(eval_rows) if eval_rows else None,
        data_collator=PadRight(tokenizer.pad_token_id, pad_to_multiple_of=1 if config.use_cpu else 8),
        processing_class=tokenizer,
        callbacks=[*callbacks, *stop],
    )
    trainer.row_order = EpochSampler(
        [len(row.input_ids) for row in train_rows],
        batch_size=section.batch_size,
        seed=section.seed,
        group_by_length=section.group_by_length,
    )
    for name, weight in model.named_parameters():
        if name in weights:
            weight.data = weights[name]
    return trainer


def _to_dataset(rows: Sequence[EncodedRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
