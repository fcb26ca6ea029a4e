"""Precision and engine on a card that is not here."""

from __future__ import annotations

import importlib.util

import pytest

from gemma_tune.engines.settle import settle
from gemma_tune.errors import EngineError
from gemma_tune.machine.cards import CARDS
from gemma_tune.recipe.schema import DataSection, ModelSection, Recipe

T4, L4 = CARDS["t4"], CARDS["l4"]


def recipe(**model: object) -> Recipe:
    return Recipe(data=DataSection(source="x", max_seq_tokens=8), model=ModelSection.model_validate(model))


def test_the_card_decides_the_precision() -> None:
    assert settle(recipe(), card=T4)[0].compute == "float16"
    assert settle(recipe(), card=L4)[0].compute == "bfloat16"
    with pytest.raises(EngineError, match=r"would be emulated"):
        settle(recipe(dtype="bfloat16"), card=T4)


def test_a_named_engine_need_not_be_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert settle(recipe(), card=L4)[1] == "transformers"
    assert settle(recipe(engine="unsloth"), card=L4)[1] == "unsloth"
