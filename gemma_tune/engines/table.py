"""The engines by name, and the choice between them."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from gemma_tune.engines.base import Engine
from gemma_tune.errors import EngineError
from gemma_tune.machine.precision import Device
from gemma_tune.recipe.schema import ModelSection, TrainingSection

ENGINES = {
    "unsloth": "gemma_tune.engines.unsloth:UnslothEngine",
    "transformers": "gemma_tune.engines.transformers:TransformersEngine",
}


@dataclass(frozen=True)
class EngineChoice:
    """The engine that will be used and the reason, for the user to read."""

    name: str
    reason: str


_GPU_OPTIMIZERS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit")


def choose_engine(model: ModelSection, *, training: TrainingSection, device: Device) -> EngineChoice:
    """Pick the engine for a recipe on a device.

    Raises:
        EngineError: the named engine is not installed, or the recipe asks for what this device cannot do.
    """
    if device.kind == "cpu":
        _require_cpu_settings(model, training)
    has_unsloth = importlib.util.find_spec("unsloth") is not None
    if model.engine == "unsloth" and not has_unsloth:
        raise EngineError(
            "model.engine=unsloth, but unsloth is not installed",
            hint="use model.engine=auto, or install it: pip install 'gemma-tune[unsloth]'",
        )
    if model.engine == "auto" and training.data_parallel != "ddp":
        return EngineChoice("transformers", f"training.data_parallel={training.data_parallel} needs it")
    if model.engine != "auto":
        return EngineChoice(model.engine, "the recipe asks for it")
    if has_unsloth:
        return EngineChoice("unsloth", "it is installed, and the faster of the two")
    return EngineChoice("transformers", "unsloth is not installed")


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
    module_name, class_name = ENGINES[name].split(":")
    engine: Engine = getattr(importlib.import_module(module_name), class_name)()
    return engine
