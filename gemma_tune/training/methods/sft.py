"""Supervised fine-tuning: cross-entropy on the tokens of the response (LEAF)."""

from collections.abc import Sequence
from typing import Any

import torch

from gemma_tune.data.encode.arrays import IGNORED
from gemma_tune.training.layouts import Layout, RowArrays
from gemma_tune.training.loop import Loop, build_loop
from gemma_tune.training.methods.method import LossSums
from gemma_tune.training.parts import TrainerParts


class Sft:
    """The method `sft`; its losses are in nats, counted by supervised token."""

    def make_trainer(self, parts: TrainerParts) -> Loop:
        return build_loop(parts, self, kind=SftLoop)

    def collate(self, groups: Sequence[Sequence[RowArrays]], layout: Layout) -> dict[str, Any]:
        return layout(groups)

    def loss_of(self, trainer: Loop, batch: dict[str, Any]) -> LossSums:
        if "head_targets" in batch:
            return _loss_of_kept_logits(trainer, batch)
        mean = trainer.forward_model(**batch, use_cache=False).loss
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        return LossSums(mean.double() * count, count)


def _loss_of_kept_logits(trainer: Loop, batch: dict[str, Any]) -> LossSums:
    """Return TRL's loss from the logits that the batch says are needed, in one piece.

    TRL computes the head in checkpointed chunks of tokens, for a vocabulary of 256,000 and a small card, and its
    entropy and accuracy along. Where the logits are small that costs a third of a step.
    """
    targets = batch["head_targets"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "head_targets")}
    logits_SV = trainer.forward_model(**inputs, use_cache=False).logits.flatten(0, 1).float()  # no copy of the gradient
    return LossSums(torch.nn.functional.cross_entropy(logits_SV, targets, reduction="sum"), len(targets))


class SftLoop(Loop):
    """Trains with TRL's loss, which engines have kernels for, where the batch does not say which logits are needed."""

    takes_head_targets = True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a forward pass; see `Loop.compute_loss`."""
        compute = super().compute_loss if "head_targets" in inputs else self.trl_loss
        return compute(model, inputs, *args, **kwargs)
