"""What llama.cpp computes for a family of Gemmas; a config for which that is not what was trained is refused.

A GGUF file has no field for the scale of the attention scores, the order of sliding and full layers, the activation or
a bias: llama.cpp takes Gemma's own values for granted (`GgufFacts`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import ExportError
from gemma_tune.models import safetensors as files
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.families.family import GgufFacts
from gemma_tune.models.families.known import FAMILIES

_KEEP_HINT = "export `merged-16bit` instead: vLLM and transformers read the config as it is"


@dataclass(frozen=True)
class GgufArchitecture:
    """A config that llama.cpp computes as transformers does; `notes` name the difference that is left.

    `rope_factor` scales the positions of full attention linearly (Gemma 3 4B and larger)."""

    config: TextConfig
    facts: GgufFacts
    rope_factor: float | None
    notes: tuple[str, ...]


def read_architecture(directory: Path) -> GgufArchitecture:
    """Read config.json; ExportError names the first setting that a GGUF file cannot carry."""
    config = read_config(directory)
    where = f"{directory / files.CONFIG_FILE}"
    facts = check_config(config, where)
    rope_factor = _rope_factor(files.read_config(directory), config, facts, where)
    notes = []
    if config.activation == "gelu":
        notes.append("the config says `gelu`; llama.cpp computes Gemma's own form of it, gelu_pytorch_tanh")
    return GgufArchitecture(config, facts, rope_factor, tuple(notes))


def check_config(config: TextConfig, where: str) -> GgufFacts:
    """Return what llama.cpp takes for granted in this family; ExportError names the first setting that differs."""
    facts = config.facts.gguf
    if facts is None:
        able = ", ".join(family.title for family in FAMILIES.values() if family.gguf is not None)
        raise ExportError(
            f"{where}: model_type is {config.model_type}: only {able} can be written as GGUF", hint=_KEEP_HINT
        )
    reason = _unsupported(config, facts)
    if reason:
        raise ExportError(f"{where}: {reason}", hint=_KEEP_HINT)
    return facts


def _unsupported(config: TextConfig, facts: GgufFacts) -> str | None:
    title = config.facts.title
    if config.quantization:
        return f"the weights are quantised ({config.quantization}); GGUF is made from 16-bit weights"
    if config.activation not in ("gelu_pytorch_tanh", "gelu"):
        return f"the activation is {config.activation}, llama.cpp computes gelu_pytorch_tanh"
    if config.has_attention_bias:
        return "attention_bias is true, llama.cpp's Gemma has no bias"
    every = facts.full_attention_every
    found = [layer.attention for layer in config.layers]
    if found != ["sliding" if (index + 1) % every else "full" for index in range(config.num_layers)]:
        pattern = f"in which every {every}. layer has full attention"
        return f"layer_types is not llama.cpp's pattern for {config.family}, {pattern}"
    softcaps = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.final_softcap}
    for name, softcap in softcaps.items():
        if facts.softcaps is True and softcap is None:
            return f"{name} is null; llama.cpp would take {title}'s own value"
        if facts.softcaps is False and softcap is not None:
            return f"a soft cap is set; llama.cpp's {title} has none"
    if facts.scales_queries:
        by_width = config.num_layers == facts.num_layers_scaled_by_width
        expected = config.hidden_size // config.num_heads if by_width else config.head_dim
        if config.query_pre_attn_scalar != expected:
            return (
                f"query_pre_attn_scalar is {config.query_pre_attn_scalar:g}; "
                f"llama.cpp takes {expected} for {config.num_layers} layers of this shape"
            )
    return None


def _rope_factor(content: Mapping[str, Any], config: TextConfig, facts: GgufFacts, where: str) -> float | None:
    """The linear factor of full attention; refuses any other scaling, and one where llama.cpp has none."""
    text = content.get("text_config") if config.is_multimodal else content
    assert isinstance(text, Mapping)  # read_config has checked it
    scaling: dict[str, Any] = text.get("rope_scaling") or {}
    parameters: dict[str, Any] = text.get("rope_parameters") or {}
    full = {**scaling, **parameters.get("full_attention", parameters)}
    sliding = parameters.get("sliding_attention", {})
    kind = full.get("rope_type", full.get("type", "default"))
    kind_sliding = sliding.get("rope_type", "default")
    if kind == "default" and kind_sliding == "default":
        return None
    if not facts.scales_positions or kind != "linear" or kind_sliding != "default":
        told = f"{kind}, and {kind_sliding} in sliding layers" if kind_sliding != "default" else kind
        raise ExportError(
            f"{where}: the rope scaling is {told}; GGUF has `linear` in the full attention of Gemma 3 only",
            hint=_KEEP_HINT,
        )
    return float(full["factor"])


def add_hyperparameters(writer: Any, architecture: GgufArchitecture) -> None:
    """Add what llama.cpp needs to build the graph to a `gguf.GGUFWriter`."""
    import gguf

    config = architecture.config
    values = {
        "context_length": config.context_tokens,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_heads,
        "head_count_kv": config.num_kv_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "layer_norm_rms_eps": config.norm_eps,
        "rope_freq_base": config.rope_theta,
        "rope_freq_base_swa": config.rope_local_theta,
        "rope_scaling_type": None if architecture.rope_factor is None else gguf.RopeScalingType.LINEAR,
        "rope_scaling_factor": architecture.rope_factor,
        "sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
    for name, value in values.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
