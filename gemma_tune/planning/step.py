"""A recipe's training step as the planner counts it, each setting as the engine's own deciders settle it."""

from dataclasses import dataclass
from typing import Literal

from gemma_tune.engines.attention import decide_attention
from gemma_tune.engines.choose import EngineDecision
from gemma_tune.engines.engine_facts import Checkpointing, EngineFacts, Head
from gemma_tune.models.config import TextConfig
from gemma_tune.recipe.schema import LoraSection, Recipe

Bits = Literal["4bit", "8bit", "plain"]

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Numerics:
    """Bytes of the number types in a step."""

    compute: int  # of matrix products
    stream: int  # of embeddings, norms and the residual stream
    autocast: bool  # trained float32 weights are copied to the compute type for a step
    # PEFT casts the input of every adapter by itself. It does where `torch.is_autocast_enabled()` is false, so never on
    # a card that trains in 16 bits (peft/tuners/lora/bnb.py).
    casts_inputs: bool = False
    dropout_mask: int = 1  # a mask element, 1 on CUDA (bool)


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once: `rows` of `tokens`, and whether padding needs a mask."""

    rows: int
    tokens: int
    padded: bool = True

    @property
    def size(self) -> int:
        return self.rows * self.tokens


@dataclass(frozen=True)
class Execution:
    """How the engine computes a step: whose code, which attention, what is recomputed, how the loss is taken."""

    engine: EngineFacts
    attention: str
    checkpointing: Checkpointing
    head: Head

    def fuses(self, config: TextConfig) -> bool:
        """Whether the engine has a hand-written backward pass for this family; others run transformers' code."""
        return config.family in self.engine.fused_families


@dataclass(frozen=True)
class Step:
    """What is computed in one forward and backward pass, and in what."""

    batch: Batch
    numerics: Numerics
    lora: LoraSection
    execution: Execution
    bits: Bits = "4bit"


def to_step(recipe: Recipe, *, config: TextConfig, decision: EngineDecision) -> Step:
    """Translate a recipe; every row is as long as the recipe allows.

    Raises:
        EngineError: the recipe asks for an attention that would compute another model.
    """
    model, training = recipe.model, recipe.training
    engine, precision = decision.engine, decision.precision
    stream = precision.compute if engine.stream_in_compute_dtype else precision.storage
    # transformers takes sdpa where it has the choice. Unsloth's own capped attention keeps its scores as `eager` does.
    attention = decide_attention(config, asked=model.attention) or "sdpa"
    # Packed rows are kept apart by positions in flash attention and in an engine's own code, else by a mask.
    needs_mask = not (training.packing and (engine.has_own_forward or attention == "flash_attention_2"))
    tokens = recipe.tokens_per_pack if training.packing else recipe.data.max_seq_tokens
    return Step(
        batch=Batch(training.batch_size * recipe.method_facts.sequences_per_row, tokens, padded=needs_mask),
        numerics=Numerics(_BYTES[precision.compute], _BYTES[stream], precision.autocast is not None),
        lora=recipe.lora,
        execution=Execution(engine, attention, engine.checkpointing(training.gradient_checkpointing), engine.head),
        bits="4bit" if model.load_in_4bit else "8bit" if model.load_in_8bit else "plain",
    )
