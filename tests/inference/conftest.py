"""The embedded Gemma in float32, loaded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_tune.data.rows.template import load_template
from gemma_tune.inference.load_target import LoadedTarget, loaded_target
from gemma_tune.paths import TINY_MODEL_DIR


@pytest.fixture(scope="session")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny(model: Any) -> LoadedTarget:
    """Asked for the continuation of bare text."""
    return loaded_target(model, tokenizer_directory=TINY_MODEL_DIR, template=load_template("completion"))


@pytest.fixture(scope="session")
def tiny_chat(model: Any) -> LoadedTarget:
    """Asked in Gemma 1's turns."""
    return loaded_target(model, tokenizer_directory=TINY_MODEL_DIR, template=load_template("chat"))
