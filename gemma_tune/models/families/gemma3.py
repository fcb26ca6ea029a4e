"""Gemma 3: normed queries and keys, five sliding layers to a full one, and SigLIP for images from 4B on."""

from __future__ import annotations

from gemma_tune.models.families.family import Family, GgufFacts

GEMMA_3 = Family(
    name="gemma3",
    title="Gemma 3",
    model_types=("gemma3", "gemma3_text"),
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    full_attention_every=6,
    reads_window_pattern=True,
    has_local_rope=True,
    towers=("vision_tower", "multi_modal_projector"),
    tower_renames=(("vision_tower.vision_model.", "vision_tower."),),
    gguf=GgufFacts(
        architecture="gemma3",
        full_attention_every=6,
        ties_head=False,
        softcaps=False,
        scales_queries=True,
        num_layers_scaled_by_width=62,
        scales_positions=True,
    ),
)
