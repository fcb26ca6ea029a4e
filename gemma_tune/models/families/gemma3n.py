"""Gemma 3n: per-layer embeddings, AltUp, LAuReL, and last layers that take keys and values from earlier ones."""

from __future__ import annotations

from gemma_tune.models.families.family import Family

GEMMA_3N = Family(
    name="gemma3n",
    title="Gemma 3n",
    model_types=("gemma3n", "gemma3n_text"),
    defaults={
        "vocab_size": 262_400,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "altup_num_inputs": 4,
        "num_kv_shared_layers": 15,
        "laurel_rank": 64,
    },
    full_attention_every=5,
    mlp_widths_differ=True,
    has_local_rope=True,
    norm_adds_one=False,
    towers=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
)
