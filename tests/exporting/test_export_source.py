"""What is exported: a bare adapter with the base that it names or is given, and combinations of adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.errors import ExportError, GemmaTuneError
from gemma_tune.exporting.export_source import Combination, combine_sources, open_source
from gemma_tune.identity import json_sha256
from gemma_tune.paths import TINY_MODEL_DIR


@pytest.fixture(scope="module")
def adapters(make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    return make_adapter(TINY_MODEL_DIR), make_adapter(TINY_MODEL_DIR, lora_alpha=2)


def test_a_bare_adapter_has_the_base_that_it_names(adapters: tuple[Path, Path]) -> None:
    source = open_source(adapters[0])
    assert source.base.directory == TINY_MODEL_DIR
    assert (source.run, source.trained_dtype, source.template) == (None, None, None)
    assert source.base_name == TINY_MODEL_DIR.name  # no folder of this machine
    weights = (TINY_MODEL_DIR / "model.safetensors").read_bytes()
    assert source.base_files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert source.default_output == adapters[0].with_name("adapter-export")
    assert open_source(adapters[0], base="gemma-tiny").base_name == "gemma-tiny"


def test_an_adapter_that_names_no_base(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((adapters[0] / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="does not name its base model") as caught:
        open_source(tmp_path)
    assert caught.value.hint == "name it with --base"
    with pytest.raises(GemmaTuneError, match="gemma-9x"):
        open_source(tmp_path, base="gemma-9x")


@pytest.mark.parametrize("path", [Path("gemma-tiny"), TINY_MODEL_DIR])
def test_a_model_is_not_exported(path: Path) -> None:
    with pytest.raises(ExportError, match="is a model, a run or an adapter is expected"):
        open_source(path)


def test_adapters_are_combined_once(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    first = open_source(adapters[0], base="gemma-tiny")
    combination = Combination(others=(adapters[1],), weights=(0.5, -2.0), method="cat")
    combined = combine_sources(first, combination, directory=tmp_path)
    assert combined.run is None and combined.name == "adapter-combined" and combined.base == first.base

    def change(directory: Path, scaling: float) -> torch.Tensor:
        tensors = load_file(directory / "adapter_model.safetensors")
        start = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
        return scaling * tensors[start + "B.weight"] @ tensors[start + "A.weight"]

    wanted = 0.5 * change(adapters[0], 6 / 4) - 2.0 * change(adapters[1], 2 / 4)
    assert torch.allclose(change(combined.adapter, 1.0), wanted, atol=1e-5)
    assert combine_sources(first, combination, directory=tmp_path).adapter == combined.adapter
    other = combine_sources(first, Combination((adapters[1],), (0.5, 2.0), "cat"), directory=tmp_path)
    assert other.adapter != combined.adapter


def test_the_order_of_keys_does_not_matter() -> None:
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1}) != json_sha256({"a": 1, "b": [3]})
