"""Gemma 4: full-attention layers of another shape, per-layer embeddings or experts, and an encoder-free 12B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tune.models.families.family import Family

_UNIFIED_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
GEMMA_4 = Family(
    name="gemma4",
    title="Gemma 4",
    model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    defaults={
        "vocab_size": 262_144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "global_head_dim": 512,
    },
    defaults_of_type={"gemma4_unified": _UNIFIED_DEFAULTS, "gemma4_unified_text": _UNIFIED_DEFAULTS},
    full_attention_every=6,
    ends_with_full_attention=True,
    full_layers_differ=True,
    has_local_rope=True,
    default_rope={"rope_type": "proportional", "partial_rotary_factor": 0.25},
    norm_adds_one=False,
    towers=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    turn_end="<turn|>",
)
