"""The fast engine: Unsloth's `FastLanguageModel` (LEAF; the only file that imports unsloth).

Unsloth patches transformers, PEFT and TRL when it is imported, so it is imported first. What it prints is kept off
stdout by `engines.quiet`.
"""

from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel, tokenizer_utils  # isort: skip  (must precede torch, transformers and peft)

import torch

from gemma_tune.engines.attention import choose_attention
from gemma_tune.engines.base import AttachedLora, LoadedModel, LoadSettings
from gemma_tune.engines.engine_facts import ENGINES, Checkpointing
from gemma_tune.engines.lora import check_attached, require_targets, to_lora_settings
from gemma_tune.engines.quantized import require_quantized
from gemma_tune.recipe.schema import LoraSection

# Its probes would render the base's chat template in this process without limits; the tokenizer it loads is not used.
tokenizer_utils._fix_chat_template_for_tokenizer = lambda _, chat_template: chat_template

_CHECKPOINTING: dict[Checkpointing, str | bool] = {"off": False, "on": True, "offload": "unsloth"}


class UnslothEngine:
    """Loads with `FastLanguageModel.from_pretrained`, attaches with `FastLanguageModel.get_peft_model`."""

    name = "unsloth"
    _checkpointing: str | bool = False

    def load(self, directory: Path, settings: LoadSettings) -> LoadedModel:
        section, precision = settings.section, settings.precision
        # On CUDA Unsloth brings its own capped attention for Gemma 2; on a CPU it takes what transformers takes.
        leaves_choice = section.attention == "auto" and torch.cuda.is_available()
        attention = None if leaves_choice else choose_attention(directory, asked=section.attention)
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(directory),
            max_seq_length=settings.max_seq_tokens,
            # Unsloth keeps its own float32 islands where it computes in float16, and wants the compute dtype.
            dtype=getattr(torch, precision.compute),
            load_in_4bit=section.load_in_4bit,
            load_in_8bit=section.load_in_8bit,
            use_gradient_checkpointing=False,
            local_files_only=True,
            **options,
        )
        num_quantized = require_quantized(model, wanted=section.load_in_4bit or section.load_in_8bit)
        model.requires_grad_(False)
        return LoadedModel(model=model, engine=self.name, precision=precision, num_quantized_layers=num_quantized)

    def attach_lora(
        self, loaded: LoadedModel, *, section: LoraSection, gradient_checkpointing: str, seed: int
    ) -> AttachedLora:
        require_targets(loaded.model, section=section)
        self._checkpointing = _CHECKPOINTING[ENGINES[self.name].checkpointing(gradient_checkpointing)]
        # FastLanguageModel leaves the towers of a multimodal Gemma alone by itself.
        model = FastLanguageModel.get_peft_model(
            loaded.model, use_gradient_checkpointing=self._checkpointing, random_state=seed, **to_lora_settings(section)
        )
        attached = LoadedModel(model, self.name, loaded.precision, loaded.num_quantized_layers)
        return check_attached(attached, section=section)

    def set_mode(self, loaded: LoadedModel, *, training: bool) -> None:
        if training:
            FastLanguageModel.for_training(loaded.model, use_gradient_checkpointing=self._checkpointing)
        else:
            FastLanguageModel.for_inference(loaded.model)
