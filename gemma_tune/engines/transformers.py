"""The plain engine: transformers, bitsandbytes and PEFT (LEAF)."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from gemma_tune.engines.attention import choose_attention
from gemma_tune.engines.base import AttachedLora, LoadedModel, LoadSettings
from gemma_tune.engines.lora import check_attached, is_in_tower, require_targets, to_lora_settings
from gemma_tune.engines.quantized import keep_trainable_layout, require_quantized
from gemma_tune.models.families.known import tower_names
from gemma_tune.recipe.schema import LoraSection, ModelSection


def to_quantization_config(
    section: ModelSection, *, compute: torch.dtype, container: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | None:
    """NF4 with double quantisation (arXiv:2305.14314), LLM.int8(), or nothing.

    Args:
        container: dtype of the tensors that hold the packed 4-bit codes.
    """
    if section.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=container,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if section.load_in_8bit else None


class TransformersEngine:
    """Loads with `AutoModelForCausalLM`, attaches with `peft.get_peft_model`."""

    name = "transformers"

    def load(self, directory: Path, settings: LoadSettings) -> LoadedModel:
        section, precision = settings.section, settings.precision
        options: dict[str, Any] = {}
        quantization = to_quantization_config(
            section,
            compute=getattr(torch, precision.compute),
            # FSDP gathers the weights of a layer in one dtype.
            container=getattr(torch, precision.storage) if settings.will_be_sharded else torch.uint8,
        )
        if quantization is not None:
            options["quantization_config"] = quantization
        attention = choose_attention(directory, asked=section.attention)
        if attention is not None:
            options["attn_implementation"] = attention
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}  # never `auto`: it splits a model that fits (F48)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, precision.storage), local_files_only=True, use_safetensors=True, **options
        )
        num_quantized = require_quantized(model, wanted=quantization is not None)
        keep_trainable_layout(model)
        model.requires_grad_(False)
        return LoadedModel(model=model, engine=self.name, precision=precision, num_quantized_layers=num_quantized)

    def attach_lora(
        self, loaded: LoadedModel, *, section: LoraSection, gradient_checkpointing: str, seed: int
    ) -> AttachedLora:
        model = loaded.model
        require_targets(model, section=section)
        # PEFT's prepare_model_for_kbit_training would also cast the 256k-row embedding to float32 (3.1 GB for Gemma
        # 7B) on
        # cards that compute in bfloat16; the parts of it that matter are here and in `check_attached`.
        if gradient_checkpointing != "off":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.config.use_cache = False
        set_seed(seed)
        has_towers = any(is_in_tower(name) for name, _ in model.named_modules())
        towers = rf".*({'|'.join(tower_names())}).*" if has_towers else None
        config = LoraConfig(task_type="CAUSAL_LM", exclude_modules=towers, **to_lora_settings(section))
        attached = LoadedModel(get_peft_model(model, config), self.name, loaded.precision, loaded.num_quantized_layers)
        return check_attached(attached, section=section)

    def set_mode(self, loaded: LoadedModel, *, training: bool) -> None:
        loaded.model.train(training)
