"""Gemma 1, and CodeGemma, which has its architecture."""

from __future__ import annotations

from gemma_tune.models.families.family import Family, GgufFacts

GEMMA = Family(
    name="gemma",
    title="Gemma 1",
    model_types=("gemma",),
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    has_post_norms=False,
    has_head_norms=False,
    gguf=GgufFacts(architecture="gemma", full_attention_every=1, ties_head=True),
)
