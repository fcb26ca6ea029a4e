"""Gemma 2: soft caps, norms after attention and MLP, every second layer with a sliding window."""

from __future__ import annotations

from gemma_tune.models.families.family import Family, GgufFacts

GEMMA_2 = Family(
    name="gemma2",
    title="Gemma 2",
    model_types=("gemma2",),
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    full_attention_every=2,
    has_head_norms=False,
    gguf=GgufFacts(
        architecture="gemma2",
        full_attention_every=2,
        ties_head=True,
        softcaps=True,
        scales_queries=True,
        num_layers_scaled_by_width=46,
    ),
)
