"""Adapters on their base, against PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.engines.lora import load_adapter
from gemma_tune.errors import ModelError
from gemma_tune.inference.load_target import load_target
from gemma_tune.inference.target import find_target
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.runs.adapter_dir import AdapterDir

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


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r"model\.language_model\..*\.(q_proj|up_proj)"])
def test_the_names_of_another_release_of_transformers_mean_the_same(adapter: Path, targets: object) -> None:
    wanted = load_target(find_target(str(adapter), template="dolly"), dtype="float32").model(TOKENS).logits
    rename(adapter, ".layers.", ".language_model.layers.")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"target_modules": targets})
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    assert AdapterDir(adapter).read_lora().factors.keys() == {
        f"model.language_model.layers.{layer}.{name}"
        for layer in range(4)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert torch.equal(load_target(find_target(str(adapter), template="dolly")).model(TOKENS).logits, wanted)


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    rename(adapter, ".layers.", ".text_model.layers.")
    with pytest.raises(ModelError, match=r"8 of 8 adapter tensors have no weight in the base"):
        find_target(str(adapter), template="dolly")
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors"):
        load_target(find_target(str(adapter), template="dolly"))


def test_tensors_that_peft_would_leave_out_are_refused(adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32)
    rename(adapter, ".layers.0.", ".layers.9.")
    with pytest.raises(ModelError, match=r"does not fit the base: 8 tensors find no partner"):
        load_adapter(base, adapter)


def rename(adapter: Path, old: str, new: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(weights).items()}, weights)
