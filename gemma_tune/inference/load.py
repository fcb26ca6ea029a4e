"""A target in memory, ready to be asked (LEAF)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from gemma_tune.data.chat import ChatRenderer
from gemma_tune.data.template import DataTemplate
from gemma_tune.data.tokenize import Encoder
from gemma_tune.engines.precision import decide_precision, detect_device
from gemma_tune.engines.transformers_engine import TransformersEngine
from gemma_tune.errors import ModelError
from gemma_tune.inference.target import Target
from gemma_tune.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LoadedTarget:
    """A model with its tokenizer and the template it is asked with."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    template: DataTemplate
    chat: ChatRenderer | None


def load_target(target: Target) -> LoadedTarget:
    """Load a base as it was trained on, with its adapter.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    precision = decide_precision(target.section.dtype, device=detect_device())
    loaded = TransformersEngine().load(
        target.base.directory, section=target.section, precision=precision, max_seq_tokens=0
    )
    model = loaded.model
    if target.adapter is not None:
        model = PeftModel.from_pretrained(model, str(target.adapter))
        require_every_tensor(model, target.adapter)
    model.eval()
    model.config.use_cache = True
    tokenizer = load_tokenizer(target.tokenizer)
    chat = ChatRenderer.from_tokenizer(tokenizer) if target.template.kind == "chat" else None
    return LoadedTarget(model, tokenizer, Encoder(tokenizer), target.template, chat)


def require_every_tensor(model: Any, adapter: Path) -> None:
    """Refuse an adapter whose tensors did not all land in the model: PEFT only warns, and the effect is zero (F31)."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"{adapter} has no adapter_model.safetensors",
            hint="pickled adapters (.bin) are not loaded; save it as safetensors",
        )
    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if stored != expected:
        odd = sorted(stored ^ expected)
        raise ModelError(
            f"the adapter {adapter} does not fit the base: {len(odd)} tensors find no partner, such as {odd[0]}"
        )
