"""Precision and engine of a recipe on a card that need not be in this machine, as `train` would settle them there."""

from __future__ import annotations

from gemma_tune.engines.precision import Device, Precision, decide_precision
from gemma_tune.engines.table import choose_engine
from gemma_tune.recipe.schema import Recipe


def settle(recipe: Recipe, *, device: Device) -> tuple[Precision, str]:
    """The precision, and the name of the engine; one that the recipe names need not be installed here.

    Raises:
        EngineError: the device cannot do what the recipe asks.
    """
    engine: str = recipe.model.engine
    if engine == "auto":
        engine = choose_engine(recipe.model, training=recipe.training, device=device).name
    return decide_precision(recipe.model.dtype, device=device), engine
