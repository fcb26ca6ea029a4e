"""The model that a recipe names, as far as it is known without its weights and without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import MODELS, GemmaModel, resolve_model
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.planning import memory


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
        return 0 if whole is None else max(whole - memory.count_all(self.config), 0)


def find_base(name: str) -> Base:
    """The facts of a registry model, or of the config.json of a directory. No network.

    Raises:
        ModelError: no such model, or a hub id whose config.json is not here.
    """
    directory = Path(name).expanduser()
    # As models/registry.py resolves names: a short name of the registry wins over a directory of that name.
    if directory.is_dir() and ("/" in name or name.lower() not in MODELS):
        return Base(name, read_config(directory), None, True)
    source = resolve_model(name)
    if source.config is None:
        raise ModelError(
            f"model.name: {name} is not in the registry, and a plan reads nothing from the hub",
            hint="plan its base from `gemma-tune models list`, or download it and give the directory",
        )
    ships_with_us = source.model is not None and source.model.hub_id is None
    return Base(name, source.config, source.model, ships_with_us)
