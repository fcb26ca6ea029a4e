"""Supervised fine-tuning: cross-entropy on the tokens of the response (LEAF)."""

from __future__ import annotations

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
        mean = trainer.forward_model(**batch, use_cache=False).loss
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        return LossSums(mean.double() * count, count)


class SftLoop(Loop):
    """Trains with TRL's loss, which engines have kernels for."""

    takes_head_targets = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss; where the batch says which logits are needed, the same from those alone, in one piece.

        TRL computes the head in checkpointed chunks of tokens, for a vocabulary of 256,000 and a small card, and its
        entropy and accuracy along. Where the logits are small that costs a third of a step.
        """
        if "head_targets" not in inputs:
            return self.trl_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["head_targets"]
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in ("labels", "head_targets")}, use_cache=False
        )
        logits_SV = outputs.logits.flatten(0, 1).float()  # a view: indexing would copy the gradient
        total = torch.nn.functional.cross_entropy(logits_SV, targets, reduction="sum")
        loss = self.mean_of_step(LossSums(total, len(targets)), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
