"""Attention row by row against plain transformers, one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig, PretrainedConfig

from gemma_tune.engines.base import LoadedModel, LoadSettings
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.machine.precision import Precision
from gemma_tune.recipe.schema import LoraSection, ModelSection
from gemma_tune.training.row_attention import ROW_ATTENTION, attending_by_row

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.3,  # at 0.02 attention hardly matters, and a leak would pass for rounding
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma": GemmaConfig(**SIZES),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, sliding_window=8, query_pre_attn_scalar=32, layer_types=["sliding_attention", "full_attention"]
    ),
}
LENGTHS = (5, 23, 1, 9, 8, 30)


def load(config: PretrainedConfig, folder: Path) -> tuple[LoadedModel, torch.nn.Module]:
    """The model with an untrained adapter, and the plain one beside it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    engine = TransformersEngine()
    precision = Precision("float32", "float32", None, "test")
    loaded = engine.load(folder, LoadSettings(ModelSection(load_in_4bit=False), precision, max_seq_tokens=128))
    loaded = engine.attach_lora(loaded, section=LoraSection(rank=4), gradient_checkpointing="off", seed=0).loaded
    return loaded, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 320, (length,), generator=generator) for length in LENGTHS]


def joined(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return {"input_ids": torch.cat(parts)[None], "position_ids": positions[None]}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_reads_and_learns_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    loaded, plain = load(CONFIGS[name], tmp_path)
    loaded.model.train()
    with attending_by_row(loaded):
        assert loaded.model.get_base_model().config._attn_implementation == ROW_ATTENTION
        logits = loaded.model(**joined(rows()), use_cache=False).logits[0]
        logits.square().mean(dim=-1).sum().backward()
    together = {n: w.grad.clone() for n, w in loaded.model.named_parameters() if w.grad is not None}
    loaded.model.zero_grad()
    for part, found in zip(rows(), logits.split(LENGTHS), strict=True):
        with torch.no_grad():
            alone = plain(input_ids=part[None], use_cache=False).logits[0]
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
        loaded.model(input_ids=part[None], use_cache=False).logits[0].square().mean(dim=-1).sum().backward()
    for weight_name, weight in loaded.model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(together[weight_name], weight.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_neighbour_changes_nothing(name: str, tmp_path: Path) -> None:
    loaded, _ = load(CONFIGS[name], tmp_path)
    parts = rows()
    other = [parts[0], (parts[1] + 1) % 320, *parts[2:]]
    with attending_by_row(loaded), torch.no_grad():
        first, second = (
            loaded.model(**joined(some), use_cache=False).logits[0].split(LENGTHS) for some in (parts, other)
        )
    assert not torch.equal(first[1], second[1])
    assert all(torch.equal(first[row], second[row]) for row in range(len(LENGTHS)) if row != 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batches_and_single_rows_are_computed_as_ever(name: str, tmp_path: Path) -> None:
    loaded, plain = load(CONFIGS[name], tmp_path)
    ids = torch.zeros((2, 30), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, part in enumerate((rows()[1], rows()[5])):
        ids[index, : len(part)], mask[index, : len(part)] = part, 1
    with attending_by_row(loaded), torch.no_grad():
        padded = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        single = loaded.model(input_ids=rows()[5][None], use_cache=False).logits
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        alone = plain(input_ids=rows()[5][None], use_cache=False).logits
    torch.testing.assert_close(padded[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(single, alone, atol=1e-4, rtol=1e-4)


def test_it_is_put_back_and_stands_in_for_sdpa_alone(tmp_path: Path) -> None:
    loaded, _ = load(CONFIGS["gemma"], tmp_path / "sdpa")
    with pytest.raises(RuntimeError, match="boom"), attending_by_row(loaded):
        raise RuntimeError("boom")
    assert loaded.model.get_base_model().config._attn_implementation == "sdpa"
    # Gemma 2 caps its attention scores, which sdpa cannot: it stays with eager and its dense mask.
    capped, _ = load(Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=32), tmp_path / "capped")
    before = capped.model.get_base_model().config._attn_implementation
    with attending_by_row(capped):
        assert capped.model.get_base_model().config._attn_implementation == before
