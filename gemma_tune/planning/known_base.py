"""The model that a recipe names, as far as it is known without its weights and without a network."""

from dataclasses import dataclass

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import GemmaModel
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.describe import count_params
from gemma_tune.models.resolve import require, resolve


@dataclass(frozen=True)
class Base:
    """The model that a recipe names, as facts."""

    name: str
    config: TextConfig
    model: GemmaModel | None
    is_local: bool

    @property
    def num_tower_params(self) -> int:
        whole = None if self.model is None else self.model.num_checkpoint_params
        return 0 if whole is None else max(whole - count_params(self.config), 0)


def find_base(name: str) -> Base:
    """Look up the facts of a model of the catalogue, or read the config.json of a directory. No network.

    Raises:
        ModelError: no such model, or a hub id whose config.json is not here.
    """
    named = require(resolve(name), "a model")
    if named.kind == "model":
        return Base(name, read_config(named.path), None, True)
    if named.model is None:
        raise ModelError(
            f"model.name: {name} is not in the registry, and a plan reads nothing from the hub",
            hint="plan its base from `gemma-tune models list`, or download it and give the directory",
        )
    return Base(name, named.model.config, named.model, named.model.hub_id is None)
