"""The choice of an engine, with its reason, on this machine and for a card that is not here."""

from __future__ import annotations

import importlib.util

import pytest

from gemma_tune.engines.choose import choose_engine, decide_for_card
from gemma_tune.errors import EngineError
from gemma_tune.machine.cards import CARDS
from gemma_tune.machine.device import Device
from gemma_tune.recipe.schema import DataSection, ModelSection, Recipe, TrainingSection

CPU = Device("cpu", "Xeon")
L4 = Device("cuda", "NVIDIA L4", (8, 9), 24_000_000_000)


def choose(device: Device, *, training: TrainingSection | None = None, **model: object) -> tuple[str, str]:
    section = ModelSection.model_validate(model)
    choice = choose_engine(section, training=training or TrainingSection(), device=device)
    return choice.name, choice.reason


def test_auto_takes_unsloth_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose(CPU)[0] == "unsloth"
    assert choose(CPU, engine="transformers") == ("transformers", "the recipe asks for it")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(CPU) == ("transformers", "unsloth is not installed")
    with pytest.raises(EngineError, match="unsloth is not installed"):
        choose(CPU, engine="unsloth")


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit"])
def test_gpu_optimizers_are_refused_on_a_cpu(optimizer: str) -> None:
    with pytest.raises(EngineError, match="needs a CUDA card"):
        choose(CPU, training=TrainingSection.model_validate({"optimizer": optimizer}))
    assert choose(L4, training=TrainingSection.model_validate({"optimizer": optimizer}))


@pytest.mark.parametrize("model", [{"load_in_8bit": True, "load_in_4bit": False}, {"attention": "flash_attention_2"}])
def test_gpu_settings_are_refused_on_a_cpu(model: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="needs a CUDA card"):
        choose(CPU, **model)


def _recipe(**model: object) -> Recipe:
    return Recipe(data=DataSection(source="x", max_seq_tokens=8), model=ModelSection.model_validate(model))


def test_the_card_decides_the_precision() -> None:
    assert decide_for_card(_recipe(), card=CARDS["t4"]).precision.compute == "float16"
    assert decide_for_card(_recipe(), card=CARDS["l4"]).precision.compute == "bfloat16"
    assert decide_for_card(_recipe(), card=None).precision.compute == "bfloat16"
    with pytest.raises(EngineError, match=r"would be emulated"):
        decide_for_card(_recipe(dtype="bfloat16"), card=CARDS["t4"])


def test_an_engine_for_another_card_need_not_be_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert decide_for_card(_recipe(), card=CARDS["l4"]).engine.name == "transformers"
    assert decide_for_card(_recipe(engine="unsloth"), card=CARDS["l4"]).engine.name == "unsloth"
