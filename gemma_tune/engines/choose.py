"""Engine and precision of a recipe on a device: decided here, for training, plans and checks alike."""

import importlib
import importlib.util
from dataclasses import dataclass

from gemma_tune.engines.base import Engine
from gemma_tune.engines.engine_facts import ENGINES, EngineFacts
from gemma_tune.errors import EngineError
from gemma_tune.machine.cards import CARDS, Card
from gemma_tune.machine.device import Device
from gemma_tune.machine.precision import Precision, decide_precision
from gemma_tune.recipe.schema import ModelSection, Recipe, TrainingSection


@dataclass(frozen=True)
class EngineChoice:
    """The engine that will be used and the reason, for the user to read."""

    name: str
    reason: str


@dataclass(frozen=True)
class EngineDecision:
    """What a recipe computes with on a device, decided before anything is loaded."""

    device: Device
    precision: Precision
    choice: EngineChoice

    @property
    def engine(self) -> EngineFacts:
        return ENGINES[self.choice.name]


_GPU_OPTIMIZERS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit")


def decide_engine(recipe: Recipe, *, device: Device) -> EngineDecision:
    """Decide precision and engine for a recipe on a device of this machine.

    Raises:
        EngineError: the named engine is not installed, or the recipe asks for what this device cannot do.
    """
    precision = decide_precision(recipe.model.dtype, device=device)
    return EngineDecision(device, precision, choose_engine(recipe.model, training=recipe.training, device=device))


def decide_for_card(recipe: Recipe, *, card: Card | None) -> EngineDecision:
    """Decide as `train` would on a card that need not be in this machine; so need not an engine that the recipe names.

    Without a card, as on an L4: bfloat16, like any card since 2020.

    Raises:
        EngineError: the card cannot do what the recipe asks.
    """
    device = (card or CARDS["l4"]).device
    if recipe.model.engine == "auto":
        return decide_engine(recipe, device=device)
    precision = decide_precision(recipe.model.dtype, device=device)
    return EngineDecision(device, precision, EngineChoice(recipe.model.engine, "the recipe asks for it"))


def choose_engine(model: ModelSection, *, training: TrainingSection, device: Device) -> EngineChoice:
    """Choose the engine for a recipe on a device.

    Raises:
        EngineError: the named engine is not installed, or the recipe asks for what this device cannot do.
    """
    if device.kind == "cpu":
        _require_cpu_settings(model, training)
    if model.engine != "auto":
        asked = ENGINES[model.engine]
        if not is_installed(asked):
            raise EngineError(
                f"model.engine={asked.name}, but {asked.name} is not installed",
                hint=f"use model.engine=auto, or install it: {asked.install}",
            )
        return EngineChoice(asked.name, "the recipe asks for it")
    able = [each for each in ENGINES.values() if training.data_parallel == "ddp" or each.why_not_sharded is None]
    chosen = next(each for each in able if is_installed(each))
    if len(able) < len(ENGINES):
        return EngineChoice(chosen.name, f"training.data_parallel={training.data_parallel} needs it")
    why = "it is installed, and the fastest" if chosen is able[0] else f"{able[0].name} is not installed"
    return EngineChoice(chosen.name, why)


def is_installed(engine: EngineFacts) -> bool:
    """Return whether what an engine needs can be imported, without importing it."""
    return all(importlib.util.find_spec(name) is not None for name in engine.packages[:1])


def _require_cpu_settings(model: ModelSection, training: TrainingSection) -> None:
    """Refuse what needs a CUDA card, by name, instead of replacing it silently as Unsloth's CPU backend does."""
    refused = [
        (training.optimizer in _GPU_OPTIMIZERS, f"training.optimizer={training.optimizer}", "training.optimizer=adamw"),
        (model.load_in_8bit, "model.load_in_8bit=true", "model.load_in_4bit=true model.load_in_8bit=false"),
        (model.attention == "flash_attention_2", "model.attention=flash_attention_2", "model.attention=auto"),
    ]
    for is_asked, setting, instead in refused:
        if is_asked:
            raise EngineError(f"{setting} needs a CUDA card, and this machine has none", hint=f"use {instead}")


def start_engine(name: str) -> Engine:
    """Import and build an engine. Must come before any import of transformers or trl, as Unsloth patches both."""
    module_name, class_name = ENGINES[name].location.split(":")
    engine: Engine = getattr(importlib.import_module(module_name), class_name)()
    return engine
