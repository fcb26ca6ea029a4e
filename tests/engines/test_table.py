"""The choice of an engine, with its reason."""

from __future__ import annotations

import importlib.util

import pytest

from gemma_tune.engines.precision import Device
from gemma_tune.engines.table import choose_engine
from gemma_tune.errors import EngineError
from gemma_tune.recipe.schema import LoraSection, ModelSection, TrainingSection

CPU = Device("cpu", "Xeon")
L4 = Device("cuda", "NVIDIA L4", (8, 9), 24_000_000_000)


def choose(
    device: Device, *, training: TrainingSection | None = None, dora: bool = False, **model: object
) -> tuple[str, str]:
    section = ModelSection.model_validate(model)
    choice = choose_engine(
        section, lora=LoraSection(use_dora=dora), training=training or TrainingSection(), device=device
    )
    return choice.name, choice.reason


def test_auto_takes_unsloth_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose(CPU)[0] == "unsloth"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(CPU) == ("transformers", "not unsloth: unsloth is not installed")
    with pytest.raises(EngineError, match="unsloth is not installed"):
        choose(CPU, engine="unsloth")


def test_dora_on_cuda_goes_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    name, reason = choose(L4, dora=True)
    assert name == "transformers"
    assert "DoRA" in reason
    assert choose(CPU, dora=True)[0] == "unsloth"


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion_8bit"])
def test_gpu_optimizers_are_refused_on_a_cpu(optimizer: str) -> None:
    with pytest.raises(EngineError, match="needs a CUDA card"):
        choose(CPU, training=TrainingSection.model_validate({"optimizer": optimizer}))
    assert choose(L4, training=TrainingSection.model_validate({"optimizer": optimizer}))


@pytest.mark.parametrize("model", [{"load_in_8bit": True, "load_in_4bit": False}, {"attention": "flash_attention_2"}])
def test_gpu_settings_are_refused_on_a_cpu(model: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="needs a CUDA card"):
        choose(CPU, **model)
