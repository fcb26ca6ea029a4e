"""Whether an adapter and a base fit, against what PEFT attaches and saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.errors import ExportError
from gemma_tune.models.safetensors import read_config, stored_tensors
from gemma_tune.runs.adapter_dir import AdapterDir
from gemma_tune.runs.adapter_fit import require_fit

REACH: dict[str, dict[str, Any]] = {
    "endings": {"target_modules": ["q_proj", "down_proj"]},
    "a path": {"target_modules": ["layers.1.self_attn.o_proj", "k_proj"]},
    "everything": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    "all but": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all but a pattern": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "another rank": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}


def save(base: Path, directory: Path, **reach: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **reach)
    get_peft_model(model, lora).save_pretrained(directory, save_embedding_layers=False)
    return directory


def check(base: Path, adapter: Path) -> None:
    lora = AdapterDir(adapter).require_sound()
    assert lora is not None
    require_fit(lora, stored_tensors(base), base_config=read_config(base))


def keep(adapter: Path, names: set[str]) -> None:
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name in names}, weights)


@pytest.mark.parametrize("name", REACH)
def test_what_peft_saves_fits_and_without_any_one_module_it_does_not(base: Path, tmp_path: Path, name: str) -> None:
    whole = save(base, tmp_path / "whole", **REACH[name])
    check(base, whole)
    names = set(load_file(whole / "adapter_model.safetensors"))
    modules = {each.split(".lora_")[0].removesuffix(".weight") for each in names}
    assert len(modules) > 1
    for module in modules:
        part = Path(shutil.copytree(whole, tmp_path / module))
        keep(part, {each for each in names if not each.startswith(f"{module}.")})
        with pytest.raises(ExportError, match=rf"lacks modules that its config names: .*{module.split('.')[-1]}"):
            check(base, part)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["query_key_value"]},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": r".*\.q_proj"},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["v_proj"]},
    ],
)
def test_modules_that_peft_would_leave_out_are_refused(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = save(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    with pytest.raises(ExportError, match=r"adapter_config\.json names no module like these of .*v_proj"):
        check(base, adapter)


@pytest.mark.parametrize("start", ["model.language_model.", "language_model.model."])
def test_names_of_other_releases_of_transformers_fit(base: Path, tmp_path: Path, start: str) -> None:
    for reach in ("endings", "one layer", "everything"):
        adapter = save(base, tmp_path / reach, **REACH[reach])
        weights = adapter / "adapter_model.safetensors"
        tensors = {
            name.replace("base_model.model.model.", f"base_model.model.{start}"): tensor
            for name, tensor in load_file(weights).items()
        }
        save_file(tensors, weights)
        check(base, adapter)


def test_another_size_is_refused_by_name_and_shapes(base: Path, tmp_path: Path) -> None:
    adapter = save(base, tmp_path / "a", target_modules=["q_proj"])
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(8, 8)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.q_proj: the adapter fits .*the base has \(8, 8\)"):
        check(other, adapter)
