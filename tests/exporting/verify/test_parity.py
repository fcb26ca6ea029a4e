"""Figures against torch's own functions, and verdicts at and beyond their limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gemma_tune.exporting.verify.parity import LIMITS, Distance, distance, judge, perplexity

POSITIONS = [0, 2, 3, 7, 11]
EFFECT = Distance(max_abs=3.0, top1_agreement=0.5, clear_top1=0.5, mean_kl=1.0, rms=1.0)
NONE = Distance(max_abs=0.0, top1_agreement=1.0, clear_top1=1.0, mean_kl=0.0, rms=0.0)


def two_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    wanted = 4 * torch.randn(12, 50, generator=generator)
    return wanted, wanted + 0.7 * torch.randn(12, 50, generator=generator)


def test_distance_is_that_of_torch() -> None:
    wanted, found = two_logits()
    measured = distance(wanted.numpy(), found.numpy(), positions=POSITIONS)
    want, have = wanted[POSITIONS], found[POSITIONS]
    kl = torch.nn.functional.kl_div(have.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean")
    same = want.argmax(-1) == have.argmax(-1)
    lead = want.topk(2).values
    assert measured.max_abs == pytest.approx(float((want - have).abs().max()))
    assert measured.rms == pytest.approx(float((want - have).square().mean().sqrt()))
    assert measured.mean_kl == pytest.approx(float(kl), rel=1e-5)
    assert measured.top1_agreement == pytest.approx(float(same.float().mean()))
    assert measured.clear_top1 == pytest.approx(float(same[lead[:, 0] - lead[:, 1] >= 0.1].float().mean()))


def test_a_tie_is_no_preference() -> None:
    wanted = np.array([[1.0, 0.95, 0.0], [3.0, 0.0, 0.0]], dtype=np.float32)
    found = np.array([[0.95, 1.0, 0.0], [3.0, 0.0, 0.0]], dtype=np.float32)
    measured = distance(wanted, found, positions=[0, 1])
    assert (measured.top1_agreement, measured.clear_top1) == (0.5, 1.0)


def test_perplexity_is_that_of_torch() -> None:
    logits, _ = two_logits()
    targets = [(0, 3), (4, 49), (11, 7)]
    at, tokens = torch.tensor(targets).T
    loss = torch.nn.functional.cross_entropy(logits[at], tokens)
    assert perplexity(logits.numpy(), targets) == pytest.approx(float(loss.exp()), rel=1e-5)
    assert np.isnan(perplexity(logits.numpy(), []))


@pytest.mark.parametrize(
    ("limits", "at_the_limit", "beyond"),
    [
        ("float32", {"max_abs": 1e-4}, {"max_abs": 1.1e-4}),
        ("float16", {"rms": 0.05}, {"rms": 0.051}),
        ("bfloat16", {"rms": 0.1}, {"rms": 0.11}),
        ("gguf", {"clear_top1": 0.97, "mean_kl": 1e-3}, {"clear_top1": 0.96}),
        ("gguf", {"top1_agreement": 0.5}, {"mean_kl": 1.1e-3}),
        ("4bits", {"mean_kl": 0.5, "clear_top1": 0.5}, {"mean_kl": 0.51}),
    ],
)
def test_verdicts(limits: str, at_the_limit: dict[str, float], beyond: dict[str, float]) -> None:
    assert judge(replace(NONE, **at_the_limit), EFFECT, LIMITS[limits])[0]
    passed, reason = judge(replace(NONE, **beyond), EFFECT, LIMITS[limits])
    assert not passed and "expected" in reason


@pytest.mark.parametrize("limits", LIMITS)
def test_nan_fails_everywhere(limits: str) -> None:
    wanted, found = two_logits()
    found[3, 5] = float("nan")
    passed, reason = judge(distance(wanted.numpy(), found.numpy(), positions=POSITIONS), EFFECT, LIMITS[limits])
    assert not passed and "NaN" in reason


def test_an_adapter_without_effect_fails() -> None:
    passed, reason = judge(NONE, NONE, LIMITS["bfloat16"])
    assert not passed and "does not change the base" in reason
