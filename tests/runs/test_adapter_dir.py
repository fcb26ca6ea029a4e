"""Whoever reads an adapter directory hears in a sentence what is missing or damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemma_tune.errors import ExportError, GemmaTuneError, ModelError, RunError
from gemma_tune.recipe.schema import LoraSection
from gemma_tune.runs.adapter_dir import AdapterDir, open_run_adapter
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.warm_start import find_adapter

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "google/gemma-2b", "revision": "abc"}
KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    tensors = {f"{KEY}A.weight": torch.ones(2, 3), f"{KEY}B.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_what_an_adapter_says_of_itself(directory: Path, tmp_path: Path) -> None:
    adapter = AdapterDir(directory)
    assert adapter.exists and (adapter.base_name, adapter.base_revision) == ("google/gemma-2b", "abc")
    assert set(adapter.read_header()) == {f"{KEY}A.weight", f"{KEY}B.weight"}
    (factors,) = adapter.read_lora().factors.values()
    assert (factors.weight_shape, factors.scaling) == ((5, 3), 2.0)
    weights = (directory / "adapter_model.safetensors").read_bytes()
    assert adapter.hashes()["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert adapter.choose_tokenizer(tmp_path / "base") == tmp_path / "base"
    (directory / "tokenizer_config.json").touch()
    assert adapter.choose_tokenizer(tmp_path / "base") == directory


@pytest.mark.parametrize("error", [ExportError, ModelError, RunError])
def test_what_is_missing_or_damaged_is_the_readers_error(error: type[GemmaTuneError], directory: Path) -> None:
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(error, match=r"has no adapter_model\.safetensors, and adapter_model\.bin is a pickle"):
        AdapterDir(directory, error).read_header()
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(error, match=r"has no adapter_model\.safetensors") as caught:
        AdapterDir(directory, error).hashes()
    assert caught.value.hint and "finished run" in caught.value.hint
    config.write_text(json.dumps({**CONFIG, "base_model_name_or_path": ""}), encoding="utf-8")
    with pytest.raises(error, match="does not name its base model"):
        AdapterDir(directory, error).require_base_name(hint="name it")
    for text, told in (("{", "not JSON"), ("[]", "not a mapping")):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(error, match=rf"adapter_config\.json is damaged: {told}"):
            _ = AdapterDir(directory, error).config
    config.unlink()
    assert not AdapterDir(directory).exists
    with pytest.raises(error, match=r"has no adapter_config\.json"):
        _ = AdapterDir(directory, error).base_name


def test_damaged_weights_are_named(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        AdapterDir(directory).read_header()


def test_a_training_starts_only_from_an_adapter_of_its_shape(directory: Path) -> None:
    lora = LoraSection(rank=2, alpha=4)
    start = find_adapter(str(directory), lora=lora)
    assert (start.base, start.directory) == ("google/gemma-2b", directory)
    with pytest.raises(RunError, match=r"lora\.rank is 3, the adapter has 2"):
        find_adapter(str(directory), lora=LoraSection(rank=3, alpha=4))
    (directory / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="not JSON"):
        find_adapter(str(directory), lora=lora)
    with pytest.raises(RunError, match="has no adapter_model"):
        find_adapter(str(directory / "nowhere"), lora=lora)


def test_a_run_without_an_adapter_says_how_to_look(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no adapter yet") as caught:
        open_run_adapter(RunDir(tmp_path))
    assert caught.value.hint == f"see how far it is: gemma-tune report {tmp_path}"
