"""Stored weights against an independent sum: right ones pass for every kind of adapter, wrong ones are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.exporting.verify.weight_check import check_gguf_weights, check_merged_weights

Maker = Callable[..., Path]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


def spoil(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_right_merge_passes(kind: str, dtype: Any, make_base: Maker, make_adapter: Maker, tmp_path: Path) -> None:
    base = make_base(dtype=torch.bfloat16)
    adapter = make_adapter(base, **ADAPTERS[kind])
    merge_adapter(base, adapter, merged := tmp_path / "merged", settings=ExportSettings(dtype=dtype))
    check = check_merged_weights(base, adapter, merged)
    assert check.passed, check
    assert check.num_tensors + len(check.skipped) == len(load_file(merged / "model.safetensors"))
    assert not check.skipped


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda weight: weight * 1.02, lambda weight: weight.flip(0)],
    ids=["zeroed", "two percent", "rows in another order"],
)
def test_a_wrong_tensor_is_named(
    change: Callable[[torch.Tensor], torch.Tensor], make_base: Maker, make_adapter: Maker, tmp_path: Path
) -> None:
    base = make_base(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    merge_adapter(base, adapter, merged := tmp_path / "merged")
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(merged / "model.safetensors", name, change)
    check = check_merged_weights(base, adapter, merged)
    assert check.wrong == (name,) and name in check.told() and not check.passed


def test_the_base_is_not_the_merged_model(make_base: Maker, make_adapter: Maker) -> None:
    base = make_base(dtype=torch.bfloat16)
    assert len(check_merged_weights(base, make_adapter(base), base).wrong) == 14  # seven projections, two layers


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_ggufs(family: str, dtype: Any, make_gguf_source: Maker, tmp_path: Path) -> None:
    source = make_gguf_source(family)
    convert_to_gguf(source, tmp_path / "right.gguf", dtype=dtype, provenance=GgufProvenance("test"))
    right = check_gguf_weights(source, tmp_path / "right.gguf")
    assert right.passed and right.num_tensors == len(load_file(source / "model.safetensors")), right
    wrong = tmp_path / "wrong"
    shutil.copytree(source, wrong)
    spoil(wrong / "model.safetensors", "model.layers.0.self_attn.k_proj.weight", lambda weight: weight * 1.1)
    spoil(wrong / "model.safetensors", "model.norm.weight", lambda weight: weight - 1)
    convert_to_gguf(wrong, tmp_path / "wrong.gguf", dtype=dtype, provenance=GgufProvenance("test"))
    check = check_gguf_weights(source, tmp_path / "wrong.gguf")
    assert set(check.wrong) == {"blk.0.attn_k.weight", "output_norm.weight"}
