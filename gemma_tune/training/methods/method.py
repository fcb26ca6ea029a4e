"""What a training method is to the package; a member is a file next to this one and a row of `METHODS`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gemma_tune.recipe.schema import Recipe
from gemma_tune.training.parts import TrainerParts

if TYPE_CHECKING:
    from gemma_tune.training.layouts import Layout, RowArrays
    from gemma_tune.training.loop import Loop


@dataclass(frozen=True)
class LossSums:
    """A loss as sums, so that batches and processes add up."""

    total: Any  # sum of the losses, a scalar tensor with its gradient
    count: int  # what they are a sum over, such as supervised tokens; `total / count` is the loss


class Method(Protocol):
    """A training objective. The class is built without arguments after the engine has started."""

    def make_trainer(self, parts: TrainerParts) -> Loop:
        """Build the trainer; `loop.build_loop` does what all methods share."""
        ...

    def collate(self, groups: Sequence[Sequence[RowArrays]], layout: Layout) -> dict[str, Any]:
        """Make a batch of tensors, with `num_tokens`, the count of tokens that are not padding."""
        ...

    def loss_of(self, trainer: Loop, batch: dict[str, Any]) -> LossSums:
        """Return the loss of a batch on the device, as `trainer.forward_model` computes it."""
        ...


def start_method(recipe: Recipe) -> Method:
    """Import and build the method of a recipe."""
    module_name, class_name = recipe.method_facts.location.split(":")
    method: Method = getattr(importlib.import_module(module_name), class_name)()
    return method
