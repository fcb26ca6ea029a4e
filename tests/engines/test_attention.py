"""Gemma 2's capped attention scores, against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig

from gemma_tune.engines.attention import choose_attention
from gemma_tune.engines.base import LoadSettings
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.errors import EngineError
from gemma_tune.machine.precision import Precision
from gemma_tune.recipe.schema import ModelSection

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 1.0,  # large scores, so that the cap bites
}


@pytest.fixture
def capped(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, query_pre_attn_scalar=1, attn_logit_softcapping=2.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def test_the_cap_is_computed(capped: Path) -> None:
    precision = Precision("float32", "float32", None, "test")
    section = ModelSection(load_in_4bit=False)
    loaded = TransformersEngine().load(capped, LoadSettings(section, precision, max_seq_tokens=32))
    ids = torch.randint(4, 320, (1, 12), generator=torch.Generator().manual_seed(1))
    plain = {
        name: AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    }
    with torch.no_grad():
        found = loaded.model.eval()(input_ids=ids).logits
        expected = {name: model(input_ids=ids).logits for name, model in plain.items()}
    assert torch.equal(found, expected["eager"])
    assert (found - expected["sdpa"]).abs().max() > 0.1  # what transformers would have taken


def test_what_cannot_cap_is_refused_and_others_are_free(capped: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(EngineError, match="caps its attention scores"):
        choose_attention(capped, asked="sdpa")
    assert choose_attention(capped, asked="auto") == choose_attention(capped, asked="eager") == "eager"
    assert choose_attention(capped, asked="flash_attention_2") == "flash_attention_2"
    free = tmp_path_factory.mktemp("free")
    AutoModelForCausalLM.from_config(GemmaConfig(**SIZES)).save_pretrained(free)
    assert choose_attention(free, asked="auto") is None
    assert choose_attention(free, asked="sdpa") == "sdpa"
