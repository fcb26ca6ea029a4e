"""Adapters on their base, against PEFT alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.errors import ModelError
from gemma_tune.inference.load_target import load_target
from gemma_tune.inference.target import find_target
from gemma_tune.paths import TINY_MODEL_DIR

TOKENS = torch.tensor([[2, 475, 1044, 498]])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = "gemma-tiny"
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_on_its_base(adapter: Path) -> None:
    loaded = load_target(find_target(str(adapter), template="dolly"), dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(adapter)).eval()(TOKENS).logits
    assert torch.equal(loaded.model(TOKENS).logits, wanted)
    without = load_target(find_target(str(adapter), template="dolly", without_adapter=True), dtype="float32")
    assert (without.model(TOKENS).logits - wanted).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = {
        name.replace(".layers.", ".language_model.layers."): tensor for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"does not fit the base: \d+ tensors find no partner"):
        load_target(find_target(str(adapter), template="dolly"))
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors"):
        load_target(find_target(str(adapter), template="dolly"))
