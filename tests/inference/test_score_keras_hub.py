"""`score_tokens` against the function that it is modelled on. Needs `pip install keras-hub`; skipped without it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gemma_tune.inference.score import score_tokens
from gemma_tune.paths import TINY_MODEL_DIR

os.environ.setdefault("KERAS_BACKEND", "torch")
keras_hub = pytest.importorskip("keras_hub")

TOKENS = torch.tensor([[2, 475, 1044, 498, 108, 1746, 647, 1640], [2, 1418, 782, 595, 1384, 0, 0, 0]])
MASK = (TOKENS != 0).long()
TARGETS = TOKENS.roll(-1, dims=1)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded Gemma with an adapter merged into it, in float32."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    directory = tmp_path_factory.mktemp("merged")
    get_peft_model(base, lora).merge_and_unload().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def theirs(merged: str) -> Any:
    backbone = keras_hub.models.GemmaBackbone.from_preset(merged, dtype="float32")
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


@pytest.fixture(scope="module")
def ours(merged: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()


def difference(theirs: Any, ours: torch.Tensor, *, mask: torch.Tensor | None = None) -> float:
    """The largest at positions that are no padding."""
    gap = np.abs(theirs.detach().numpy() - ours.detach().numpy())
    return float(gap.max() if mask is None else gap[mask.numpy() == 1].max())


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_logits_and_losses(theirs: Any, ours: Any, mask: torch.Tensor | None) -> None:
    given = {"padding_mask": mask}
    assert difference(theirs.score(TOKENS, **given), score_tokens(ours, TOKENS, **given), mask=mask) < 1e-4
    given |= {"scoring_mode": "loss", "target_ids": TARGETS}
    losses = score_tokens(ours, TOKENS, **given)
    assert difference(theirs.score(TOKENS, **given), losses, mask=mask) < 1e-4
    assert losses.mean() > 0.1


def test_intercepted_activations_are_those_of_the_same_places(theirs: Any, ours: Any) -> None:
    def seen(score: Any) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def keep(activations: torch.Tensor, index: int) -> torch.Tensor:
            found[index] = activations.detach().clone()
            return activations

        score(TOKENS, layer_intercept_fn=keep)
        return found

    wanted, got = seen(theirs.score), seen(lambda *args, **kwargs: score_tokens(ours, *args, **kwargs))
    assert sorted(wanted) == sorted(got) == [-1, 0, 1, 2, 3]
    for index, activations in wanted.items():
        assert difference(activations, got[index]) < 1e-4, index
        assert activations.abs().max() > 1e-2


@pytest.mark.parametrize("layer", range(4))
def test_replaced_activations_have_the_same_effect(theirs: Any, ours: Any, layer: int) -> None:
    def flip(activations: torch.Tensor, index: int) -> torch.Tensor:
        return activations.flip(-1) if index == layer else activations

    given = {"scoring_mode": "loss", "target_ids": TARGETS, "layer_intercept_fn": flip}
    changed = score_tokens(ours, TOKENS, **given)
    assert difference(theirs.score(TOKENS, **given), changed) < 1e-4
    plain = score_tokens(ours, TOKENS, scoring_mode="loss", target_ids=TARGETS)
    assert (changed - plain).abs().max() > 1e-2


def test_embeddings_changed_in_place(theirs: Any, ours: Any) -> None:
    """KerasHub 0.32 drops what is returned for the embeddings, but not what is done to them."""

    def halve(activations: torch.Tensor, index: int) -> torch.Tensor:
        if index == -1:
            with torch.no_grad():
                activations *= 0.5
        return activations

    assert (
        difference(theirs.score(TOKENS, layer_intercept_fn=halve), score_tokens(ours, TOKENS, layer_intercept_fn=halve))
        < 1e-4
    )


def test_gradients_of_the_losses_with_respect_to_the_embeddings(theirs: Any, ours: Any) -> None:
    """The use that KerasHub's documentation shows."""

    def gradient(score: Any) -> torch.Tensor:
        watched: list[torch.Tensor] = []

        def watch(activations: torch.Tensor, index: int) -> torch.Tensor:
            if index == -1:
                if activations.requires_grad:
                    activations.retain_grad()
                else:
                    activations.requires_grad_()
                watched.append(activations)
            return activations

        score(TOKENS, scoring_mode="loss", target_ids=TARGETS, layer_intercept_fn=watch).sum().backward()
        assert watched[0].grad is not None
        return watched[0].grad

    wanted = gradient(theirs.score)
    assert wanted.abs().max() > 1e-2
    assert difference(wanted, gradient(lambda *args, **kwargs: score_tokens(ours, *args, **kwargs))) < 1e-3
