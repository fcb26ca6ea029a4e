"""Random tiny Gemmas and adapters, made on the fly, and the logits of what PEFT runs."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

from gemma_tune.paths import TINY_MODEL_DIR

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_CLASSES = {
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKEN_IDS = [[2, 5, 17, 40, 63, 95], [2, 9, 9, 30]]

MakeBase = Callable[..., Path]
MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """make_base(family, dtype=..., shard_size=..., **config) -> directory of a random model."""

    @functools.cache
    def make(
        family: str = "gemma", *, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **config: Any
    ) -> Path:
        directory = tmp_path_factory.mktemp("base") / "model"
        make_config, make_model = _CLASSES[family]
        torch.manual_seed(0)
        model = make_model(make_config(**(_SIZES | config)))
        for parameter in model.parameters():
            # The default of 0.02 makes logits of a few hundredths, in which a wrong merge would drown.
            parameter.data.normal_(0.0, 0.2 if parameter.ndim > 1 else 0.1)
        model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
        return directory

    return make


@pytest.fixture(scope="session")
def base_dir(make_base: MakeBase) -> Path:
    """A Gemma 1 in float32, one file."""
    return make_base()


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """make_adapter(base, save=..., resize_to=..., **lora) -> directory of an adapter whose every tensor is random."""

    def make(base: Path, *, save: dict[str, Any] | None = None, resize_to: int | None = None, **lora: Any) -> Path:
        directory = tmp_path_factory.mktemp("adapter") / "adapter"
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if resize_to is not None:
            model.resize_token_embeddings(resize_to, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, LoraConfig(**(settings | lora)))
            seen = set()
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.data_ptr() not in seen:
                    seen.add(parameter.data_ptr())
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(directory, **(save or {}))
        return directory

    return make


def peft_model(base: Path, adapter: Path, *, resize_to: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize_to is not None:
        model.resize_token_embeddings(resize_to, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in TOKEN_IDS])


@pytest.fixture(scope="session")
def adapted_logits() -> Callable[..., torch.Tensor]:
    """adapted_logits(base, adapter, resize_to=...) -> logits of the unmerged pair, as PEFT computes them."""
    return lambda base, adapter, **options: logits_of(peft_model(base, adapter, **options))


@pytest.fixture(scope="session")
def merged_by_peft() -> Callable[..., dict[str, torch.Tensor]]:
    """merged_by_peft(base, adapter) -> weights by name after PEFT's own merge in float32."""
    return lambda base, adapter: dict(peft_model(base, adapter).merge_and_unload().state_dict())


@pytest.fixture(scope="session")
def merged_exactly() -> Callable[[Path, Path], dict[str, torch.Tensor]]:
    """merged_exactly(base, adapter) -> weights by name after PEFT's own merge in float64."""
    return lambda base, adapter: _merged_in(torch.float64, base, adapter)


@pytest.fixture(scope="session")
def merged_in_bfloat16() -> Callable[[Path, Path], dict[str, torch.Tensor]]:
    """merged_in_bfloat16(base, adapter) -> weights by name after PEFT's merge as most people run it."""
    return lambda base, adapter: _merged_in(torch.bfloat16, base, adapter)


def _merged_in(dtype: torch.dtype, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # autocast_adapter_dtype: the adapter's own float32 beside a bfloat16 base
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=dtype == torch.bfloat16)
        if dtype == torch.float64:
            model = model.double()
        return dict(model.merge_and_unload().state_dict())


@pytest.fixture(scope="session")
def plain_logits() -> Callable[[Path], torch.Tensor]:
    """plain_logits(directory) -> logits of a model directory in plain transformers, float32."""
    return lambda directory: logits_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


@pytest.fixture(scope="session")
def make_gguf_source(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """make_gguf_source(family, dtype=..., **config) -> a random model that llama.cpp can run, with a real tokenizer."""

    @functools.cache
    def make(
        family: str = "gemma", *, dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB", **config: Any
    ) -> Path:
        directory = tmp_path_factory.mktemp("gguf") / family
        make_config, make_model = _CLASSES[family]
        sizes = {"vocab_size": 2304, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        sizes |= {"num_hidden_layers": 7 if family == "gemma3" else 4}
        if family != "gemma":
            sizes |= {"sliding_window": 64, "query_pre_attn_scalar": 64}
        torch.manual_seed(0)
        model = make_model(make_config(**(sizes | config)))
        for parameter in model.parameters():
            # Norms far from 1 + 0, which a wrong export could miss; the matrices keep the size of what they multiply.
            parameter.data.normal_(0.0, 0.3 if parameter.ndim == 1 else 0.06)
        model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(TINY_MODEL_DIR / name, directory / name)
        return directory

    return make
