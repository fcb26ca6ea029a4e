"""LEAF. Proves a merge: base + adapter, as PEFT runs them, against the merged directory in plain transformers.

Both sides run in float32 from the files, so the only difference left is the rounding of the merged weights to their
dtype. The adapter's own effect (base against base + adapter) stands beside it, because a difference means little
without the size of what was to be kept.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gemma_tune.errors import ExportError
from gemma_tune.export.lora_adapter import read_adapter
from gemma_tune.models.files import stored_tensors

# float32: the sums differ only in their order. Measured on random Gemma 1, 2 and 3 with two layers: below 1e-5.
_MAX_FLOAT32_DIFFERENCE = 1e-4
# Share of the adapter's effect (root mean square over all logits) that rounding may cost. Rounding moves a weight by at
# most 2^-9 (bfloat16) or 2^-12 (float16) of itself, a small part of a usual fine-tune's effect; merging through 4 bits,
# the mistake to catch, cost 0.35 (0.147 of 0.416 on a small Gemma).
_MAX_SHARE_OF_EFFECT = {"BF16": 0.1, "F16": 0.05}


@dataclass(frozen=True)
class ParityReport:
    """How far the merged model is from base + adapter, over all positions of the probe rows.

    Attributes:
        dtype: the merged weights' dtype, in the format's name.
        max_abs_difference: of a logit, merged against base + adapter.
        top1_agreement: share of positions with the same most likely token, 0 to 1.
        mean_kl: mean KL(base + adapter || merged) in nats a position.
        rms_difference: root mean square over all logits.
        effect_max_abs, effect_top1_agreement, effect_mean_kl, effect_rms: the same of base + adapter against the base.
        passed, reason: the verdict and why.
    """

    dtype: str
    num_positions: int
    max_abs_difference: float
    top1_agreement: float
    mean_kl: float
    rms_difference: float
    effect_max_abs: float
    effect_top1_agreement: float
    effect_mean_kl: float
    effect_rms: float
    passed: bool
    reason: str


def verify_merge(base_dir: Path, adapter_dir: Path, merged_dir: Path, *, token_ids: list[list[int]]) -> ParityReport:
    """Compare on rows of token ids (at least one, each of at least one token).

    Needs, at its peak, 4 bytes a parameter of the model, 12 bytes x positions x vocabulary for logits, and the adapter;
    one model is in memory at a time. Whether that fits is the caller's decision. Raises ExportError when there is
    nothing to compare, never for a failed verdict: see `passed`.
    """
    if not token_ids or not all(token_ids):
        raise ExportError("verify needs at least one row of token ids, and no empty row", hint="give it some eval rows")
    model = _load(base_dir)
    rows = _adapter_rows(adapter_dir)
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    base_logits = _logits(model, token_ids)
    model = PeftModel.from_pretrained(model, str(adapter_dir))
    adapted_logits = _logits(model, token_ids)
    del model
    gc.collect()
    merged_logits = _logits(_load(merged_dir), token_ids)
    gc.collect()
    if merged_logits.shape != adapted_logits.shape:
        raise ExportError(
            f"{merged_dir}: logits {tuple(merged_logits.shape)}, base + adapter {tuple(adapted_logits.shape)}",
            hint="the directories do not belong together",
        )
    drift, effect = _Distance.between(adapted_logits, merged_logits), _Distance.between(adapted_logits, base_logits)
    dtype = _widest_rounding(merged_dir)
    passed, reason = _verdict(dtype, drift, effect)
    return ParityReport(
        dtype=dtype,
        num_positions=adapted_logits.shape[0],
        max_abs_difference=drift.max_abs,
        top1_agreement=drift.top1_agreement,
        mean_kl=drift.mean_kl,
        rms_difference=drift.rms,
        effect_max_abs=effect.max_abs,
        effect_top1_agreement=effect.top1_agreement,
        effect_mean_kl=effect.mean_kl,
        effect_rms=effect.rms,
        passed=passed,
        reason=reason,
    )


@dataclass(frozen=True)
class _Distance:
    """How far two sets of logits (positions x vocabulary) are apart."""

    max_abs: float
    top1_agreement: float
    mean_kl: float
    rms: float

    @staticmethod
    def between(wanted: torch.Tensor, found: torch.Tensor) -> _Distance:
        rows = []
        for want_f32, have_f32 in zip(wanted, found, strict=True):  # a position at a time: no copy of all logits
            want, have = want_f32.double(), have_f32.double()
            difference = want - have
            log_want, log_have = want.log_softmax(-1), have.log_softmax(-1)
            kl = (log_want.exp() * (log_want - log_have)).sum()
            agrees = (want.argmax() == have.argmax()).double()
            rows.append(torch.stack([difference.abs().max(), agrees, kl, difference.square().mean()]))
        # Reduced by torch, because Python's max() drops a NaN.
        table = torch.stack(rows)
        max_abs, (_, top1, kl_mean, square) = float(table[:, 0].max()), table.mean(dim=0).tolist()
        return _Distance(max_abs, top1, kl_mean, square**0.5)


def _verdict(dtype: str, drift: _Distance, effect: _Distance) -> tuple[bool, str]:
    """Passed or not, and why. NaN fails every comparison below, hence the form `not x <= limit`."""
    if not effect.rms > 0.0:
        return False, "the adapter does not change the base on these rows: was it trained, and do its names fit?"
    share = drift.rms / effect.rms
    if dtype in ("F32", "F64"):
        if not drift.max_abs <= _MAX_FLOAT32_DIFFERENCE:
            return False, f"logits differ by {drift.max_abs:.2g}, more than {_MAX_FLOAT32_DIFFERENCE:.0e} for {dtype}"
        return True, f"logits equal to {drift.max_abs:.1e}"
    limit = _MAX_SHARE_OF_EFFECT[dtype]
    if not share <= limit:
        return False, (
            f"rounding to {dtype} moved the logits by {share:.0%} of the adapter's effect (at most {limit:.0%}): "
            "a wrong merge, or an adapter so weak that only float32 keeps it"
        )
    return True, f"rounding to {dtype} moved the logits by {share:.1%} of the adapter's effect"


def _load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
    ).eval()


@torch.no_grad()
def _logits(model: Any, token_ids: list[list[int]]) -> torch.Tensor:
    """Logits of every position of every row, (positions, vocabulary) in float32, row by row without padding."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in token_ids])


def _adapter_rows(adapter_dir: Path) -> int | None:
    """The vocabulary rows that the adapter's embedding has, if it carries one."""
    adapter = read_adapter(adapter_dir)
    carried = dict(adapter.base_copies) | {n.removesuffix(".weight"): tensor for n, tensor in adapter.trained.items()}
    ends = [tensor for module, tensor in carried.items() if module.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    return ends[0].shape[0] if ends else None


def _widest_rounding(directory: Path) -> str:
    """The coarsest floating dtype among the merged weights; it bounds how exact the logits can be."""
    found = {tensor.dtype for tensor in stored_tensors(directory).values()}
    return next(dtype for dtype in ("BF16", "F16", "F32", "F64") if dtype in found)
