"""The verdict must pass a right merge at every dtype, and fail every wrong one that we know."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import ExportError
from gemma_tune.export.merge import merge_adapter
from gemma_tune.export.verify import verify_merge

TOKEN_IDS = [[2, 5, 17, 40, 63, 95, 11, 3, 60, 31], [2, 9, 9, 30]]
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def base(make_base: Maker) -> Path:
    return make_base(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, make_adapter: Maker) -> Path:
    return make_adapter(base)


def merged(base: Path, adapter: Path, directory: Path, *, dtype: str) -> Path:
    return merge_adapter(base, adapter, directory / "merged", dtype=dtype).output_dir  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_right_merge_passes(dtype: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    report = verify_merge(base, adapter, merged(base, adapter, tmp_path, dtype=dtype), token_ids=TOKEN_IDS)
    assert report.passed, report.reason
    assert report.num_positions == 14
    assert report.effect_max_abs > 1.0 and report.effect_mean_kl > 0.05 and report.effect_top1_agreement < 1.0
    assert report.rms_difference < 0.05 * report.effect_rms
    assert report.mean_kl < 0.01 * report.effect_mean_kl
    if dtype == "float32":
        assert report.max_abs_difference < 1e-4 and report.top1_agreement == 1.0
    else:
        assert report.max_abs_difference > 1e-4


def test_figures_are_those_of_the_logits(
    base: Path, adapter: Path, tmp_path: Path, adapted_logits: Callable[..., torch.Tensor],
    plain_logits: Callable[..., torch.Tensor],
) -> None:  # fmt: skip
    """On the rows of conftest, by another road: KL from torch's own function over all positions at once."""
    directory = merged(base, adapter, tmp_path, dtype="bfloat16")
    report = verify_merge(base, adapter, directory, token_ids=[[2, 5, 17, 40, 63, 95], [2, 9, 9, 30]])
    wanted, found, before = adapted_logits(base, adapter), plain_logits(directory), plain_logits(base)
    assert report.max_abs_difference == pytest.approx(float((wanted - found).abs().max()), rel=1e-4)
    assert report.effect_rms == pytest.approx(float((wanted - before).square().mean().sqrt()), rel=1e-4)
    kl = torch.nn.functional.kl_div(
        before.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert report.effect_mean_kl == pytest.approx(float(kl), rel=1e-3)
    agreement = (before.argmax(-1) == wanted.argmax(-1)).float().mean()
    assert report.effect_top1_agreement == pytest.approx(float(agreement))


def _round_to_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """16 levels a block of 64, as coarse as a 4-bit format."""
    blocks = weight.float().view(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).view_as(weight).to(weight.dtype)


def _spoil(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda name, tensor: _round_to_four_bits(tensor) if "_proj" in name else tensor,
        lambda name, tensor: tensor * 1.5 if name == "model.layers.1.self_attn.v_proj.weight" else tensor,
        lambda name, tensor: torch.full_like(tensor, float("nan")) if name == "model.norm.weight" else tensor,
    ],
    ids=["through four bits", "one wrong weight", "nan"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_spoilt_merge_fails(
    dtype: str, change: Callable[[str, torch.Tensor], torch.Tensor], base: Path, adapter: Path, tmp_path: Path
) -> None:
    directory = merged(base, adapter, tmp_path, dtype=dtype)
    _spoil(directory / "model.safetensors", change)
    assert not verify_merge(base, adapter, directory, token_ids=TOKEN_IDS).passed


def test_the_base_instead_of_the_merged_model_fails(base: Path, adapter: Path) -> None:
    report = verify_merge(base, adapter, base, token_ids=TOKEN_IDS)
    assert not report.passed and "100% of the adapter's effect" in report.reason


def test_an_adapter_without_effect_fails(base: Path, adapter: Path, tmp_path: Path) -> None:
    idle = tmp_path / "idle"
    shutil.copytree(adapter, idle)
    _spoil(idle / "adapter_model.safetensors", lambda name, tensor: tensor * 0.0 if "lora_B" in name else tensor)
    report = verify_merge(base, idle, base, token_ids=TOKEN_IDS)
    assert not report.passed and "does not change the base" in report.reason


def test_a_resized_vocabulary(base: Path, make_adapter: Maker, tmp_path: Path) -> None:
    adapter = make_adapter(base, resize_to=101, save={"save_embedding_layers": True})
    report = verify_merge(base, adapter, merged(base, adapter, tmp_path, dtype="float32"), token_ids=[[2, 100, 97, 5]])
    assert report.passed, report.reason


def test_nothing_to_compare(base: Path, adapter: Path) -> None:
    for token_ids in ([], [[2, 3], []]):
        with pytest.raises(ExportError, match="at least one row"):
            verify_merge(base, adapter, base, token_ids=token_ids)


def test_models_of_two_sizes(base: Path, adapter: Path, make_base: Maker) -> None:
    with pytest.raises(ExportError, match=r"logits \(14, 99\), base \+ adapter \(14, 96\)"):
        verify_merge(base, adapter, make_base(vocab_size=99), token_ids=TOKEN_IDS)
