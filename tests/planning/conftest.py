"""Tiny Gemmas with adapters, loaded and trained as the engine `transformers` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig

from gemma_tune.engines.base import LoadSettings
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.machine.precision import Precision
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.recipe.schema import LoraSection, ModelSection

_CLASSES = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 416,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 512,
}
_PRECISIONS = {
    "bfloat16": Precision("bfloat16", "bfloat16", "bf16", "test"),
    "float32": Precision("float32", "float32", None, "test"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks `torch.is_autocast_enabled()`, which speaks of CUDA alone: say yes, as in a 16-bit run on a card."""
    of_device = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: of_device(*device) if device else True)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[Any, TextConfig]]:
    """A function that makes a tiny model with an adapter and reads its facts as the planner does."""

    def make(
        family: str = "gemma",
        *,
        precision: str = "bfloat16",
        load_in_4bit: bool = True,
        attention: str = "auto",
        checkpointing: str = "off",
        lora: dict[str, Any] | None = None,
        **shape: int,
    ) -> tuple[Any, TextConfig]:
        config = _CLASSES[family](**{**_SHAPE, **shape})
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
        engine = TransformersEngine()
        loaded = engine.load(
            tmp_path,
            LoadSettings(
                ModelSection(load_in_4bit=load_in_4bit, attention=attention), _PRECISIONS[precision], max_seq_tokens=512
            ),
        )
        attached = engine.attach_lora(
            loaded, section=LoraSection(**(lora or {})), gradient_checkpointing=checkpointing, seed=0
        )
        model = attached.loaded.model
        model.train()
        return model, read_config(tmp_path)

    return make
