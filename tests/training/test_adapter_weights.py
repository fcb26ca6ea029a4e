"""An adapter's file holds the trained weights, all of them and nothing else, and is put back only where it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.errors import RunError
from gemma_tune.runs.adapter_dir import ADAPTER_WEIGHTS_FILE as WEIGHTS
from gemma_tune.training.adapter_weights import name_base, read_adapter, trained_weights, write_adapter
from tests.training.small_runs import attach, recipe_of


def stir(model: Any) -> dict[str, torch.Tensor]:
    """Give every trained weight a value of its own; returns copies."""
    generator = torch.Generator().manual_seed(1)
    for weight in trained_weights(model).values():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return {name: weight.detach().clone() for name, weight in trained_weights(model).items()}


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_written_and_read_it_is_the_same_and_peft_agrees(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    recipe = recipe_of(lora=lora)
    model = attach(base, recipe).model
    expected = stir(model)
    name_base(model, name="some/gemma", revision=None)
    write_adapter(model, tmp_path)
    other = attach(base, recipe).model
    read_adapter(other, tmp_path)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(other).items())
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, by_peft, rtol=0, atol=1e-5)
    assert len(load_file(tmp_path / WEIGHTS)) == len(expected)


def test_the_frozen_base_is_not_gathered(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(base, recipe_of()).model

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the state of the whole model was asked for")

    monkeypatch.setattr(type(model), "state_dict", refuse)
    write_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).is_file()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "garbage", "gone"])
def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path, change: str) -> None:
    model = attach(base, recipe_of()).model
    stir(model)
    write_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(iter(tensors))
    if change == "missing":
        tensors.pop(name)
    elif change == "unexpected":
        tensors[name.replace("layers.0", "layers.9")] = torch.zeros(2)
    elif change == "shape":
        tensors[name] = torch.zeros(2, 3)
    save_file(tensors, tmp_path / WEIGHTS)
    if change == "garbage":
        (tmp_path / WEIGHTS).write_bytes(b"\x80\x04 a pickle")
    elif change == "gone":
        (tmp_path / WEIGHTS).unlink()
    reason = {"missing": "is missing", "unexpected": "has no place"}.get(change, "cannot be read")
    with pytest.raises(RunError, match=reason):
        read_adapter(model, tmp_path)
