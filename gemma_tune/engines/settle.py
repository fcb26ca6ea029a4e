"""Precision and engine of a recipe on a card that need not be in this machine, as `train` would settle them there."""

from __future__ import annotations

from typing import Protocol

from gemma_tune.engines.table import choose_engine
from gemma_tune.machine.precision import Device, Precision, decide_precision
from gemma_tune.recipe.schema import Recipe


class CardFacts(Protocol):
    """What counts of `planning.cards.Card`, which this package does not know."""

    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...
    @property
    def memory_bytes(self) -> int: ...


def settle(recipe: Recipe, *, card: CardFacts) -> tuple[Precision, str]:
    """The precision, and the name of the engine; one that the recipe names need not be installed here.

    Raises:
        EngineError: the card cannot do what the recipe asks.
    """
    device = Device("cuda", card.name, card.compute_capability, card.memory_bytes)
    engine: str = recipe.model.engine
    if engine == "auto":
        engine = choose_engine(recipe.model, training=recipe.training, device=device).name
    return decide_precision(recipe.model.dtype, device=device), engine
