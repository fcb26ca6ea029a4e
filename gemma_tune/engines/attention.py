"""Which attention implementation computes what a model was trained with."""

from pathlib import Path

from gemma_tune.errors import EngineError
from gemma_tune.models.config import TextConfig, read_config


def choose_attention(directory: Path, *, asked: str) -> str | None:
    """Return `decide_attention` for the config.json of a directory."""
    return decide_attention(read_config(directory), asked=asked)


def decide_attention(config: TextConfig, *, asked: str) -> str | None:
    """Return the implementation to name to transformers, or None to leave it the choice.

    Gemma 2 caps its attention scores. transformers 5.17 loads it with `sdpa`, which has no cap and drops the setting
    without a word (F27); `eager` has it, and flash attention does.

    Raises:
        EngineError: `sdpa` is asked for, and the model caps its scores.
    """
    if config.attention_softcap is None:
        return None if asked == "auto" else asked
    if asked == "sdpa":
        raise EngineError(
            "model.attention=sdpa computes another model: this one caps its attention scores, which sdpa cannot",
            hint="use model.attention=auto",
        )
    return "eager" if asked == "auto" else asked
