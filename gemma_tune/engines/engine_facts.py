"""The engines: what is known of each without importing it. To add one, write its class in a file and its row here."""

from dataclasses import dataclass
from typing import Literal

from gemma_tune.members import Members

Checkpointing = Literal["off", "on", "offload"]
Head = Literal["chunked", "fused"]


@dataclass(frozen=True)
class EngineFacts:
    """What recipe, planner, trainer, card and doctor need to know of an engine."""

    name: str  # as `model.engine` and lock.json name it
    about: str  # a phrase for the user
    location: str  # `module:class` of its `base.Engine`, a LEAF
    packages: tuple[str, ...] = ()  # distributions that gemma-tune does not itself require, the one to import first
    install: str = ""  # the command that installs them
    why_not_sharded: str | None = None  # why it cannot train a model that is divided between processes; None: it can
    # the value of `training.gradient_checkpointing` with which it keeps layer inputs in the host's memory; every other
    # engine takes it as `on`
    own_checkpointing: str | None = None
    # on CUDA its own forward pass takes row lengths and keeps packed rows apart by their positions
    has_own_forward: bool = False
    fused_families: tuple[str, ...] = ()  # families for which it has hand-written backward passes
    head: Head = "chunked"  # how it computes logits and loss: trl's chunks of tokens, or one fused kernel
    # embeddings, norms and the residual stream have the compute type, not the storage type
    stream_in_compute_dtype: bool = False
    quantizes_towers: bool = True  # image and audio towers are quantised with the rest
    # share of a card's peak rate that its large matrix products reach, from the increase of the time from 1,024 to
    # 2,048 tokens (planning/schedule.py)
    peak_share: float = 0.43
    tags: tuple[str, ...] = ()  # of a model card on the hub

    def checkpointing(self, asked: str) -> Checkpointing:
        """Return what `training.gradient_checkpointing` means to this engine."""
        if asked == "off":
            return "off"
        return "offload" if asked == self.own_checkpointing else "on"


# The fastest first: `model.engine=auto` takes the first one that is installed and can do what the recipe asks.
ENGINES: Members[EngineFacts] = Members(
    "engine",
    (
        EngineFacts(
            name="unsloth",
            about="hand-written kernels for Gemma 1 and 2, and a fused loss",
            location="gemma_tune.engines.unsloth:UnslothEngine",
            packages=("unsloth", "unsloth_zoo"),
            install="pip install 'unsloth==2026.10.9' 'unsloth_zoo==2026.10.9'",
            why_not_sharded="unsloth's kernels need whole weights",
            own_checkpointing="unsloth",
            has_own_forward=True,
            fused_families=("gemma", "gemma2"),
            head="fused",
            # Unsloth keeps the compute type where transformers keeps float32 islands (engines/unsloth.py).
            stream_in_compute_dtype=True,
            # SKIP_QUANTIZATION_MODULES of unsloth_zoo.peft_utils.
            quantizes_towers=False,
            peak_share=0.53,
            tags=("unsloth",),
        ),
        EngineFacts(
            name="transformers",
            about="transformers, bitsandbytes and PEFT as they are",
            location="gemma_tune.engines.transformers:TransformersEngine",
        ),
    ),
)
