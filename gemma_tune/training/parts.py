"""What a trainer is made of."""

from dataclasses import dataclass
from typing import Any

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.engines.base import Engine, LoadedModel
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.context import RunContext


@dataclass(frozen=True)
class TrainerParts:
    """A model with its adapter, the rows, and the run that they are trained in."""

    context: RunContext
    recipe: Recipe
    engine: Engine
    loaded: LoadedModel  # the base with the adapter attached
    tokenizer: Any
    encoder: Encoder
    datasets: Datasets
    pack_tokens: int | None = None  # length of the packs that rows are joined into; None pads each row on its own

    @property
    def shards_model(self) -> bool:
        """Whether the model is divided between the processes once it trains."""
        return self.context.world.shards(self.recipe.training.data_parallel)
