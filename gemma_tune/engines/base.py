"""What the rest of the package sees of an engine: a small protocol and the loaded model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma_tune.machine.precision import Precision
from gemma_tune.recipe.schema import LoraSection, ModelSection


@dataclass(frozen=True)
class LoadSettings:
    """How a base is loaded."""

    section: ModelSection
    precision: Precision
    max_seq_tokens: int  # of the longest row, or what the model takes
    will_be_sharded: bool = False  # over several processes, each of which holds a part of every weight


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory, possibly with an adapter attached."""

    model: Any  # a transformers causal language model, or the PEFT model around it
    engine: str  # name of the engine that loaded it
    precision: Precision  # what it computes in
    num_quantized_layers: int  # linear layers held in 4 or 8 bits; 0 for a 16- or 32-bit model


@dataclass(frozen=True)
class AttachedLora:
    """What got an adapter."""

    loaded: LoadedModel  # the model with the adapter
    num_modules: dict[str, int]  # modules with an adapter, by target name
    num_trainable: int  # trained parameters
    num_total: int  # all parameters, quantised ones counted unpacked


class Engine(Protocol):
    """Loads Gemma and attaches LoRA. One engine a process: Unsloth rewires transformers and TRL when it is imported."""

    name: str

    def load(self, directory: Path, settings: LoadSettings) -> LoadedModel:
        """Load the base from a local Hugging Face directory."""
        ...

    def attach_lora(
        self, loaded: LoadedModel, *, section: LoraSection, gradient_checkpointing: str, seed: int
    ) -> AttachedLora:
        """Attach a fresh adapter; its effect is zero until it is trained."""
        ...

    def set_mode(self, loaded: LoadedModel, *, training: bool) -> None:
        """Switch between training and generation."""
        ...
