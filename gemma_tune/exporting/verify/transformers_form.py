"""LEAF. Forms that transformers loads: a directory, a base with a PEFT adapter, and what a 4-bit run trained on.

Everything is computed in float32 from the files, unless the form says otherwise, so that the only difference left
between two forms is the rounding of their weights. On the CPU: what is compared must not depend on a card.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from gemma_tune.engines.attention import choose_attention
from gemma_tune.engines.lora import load_adapter
from gemma_tune.engines.quantized import keep_trainable_layout
from gemma_tune.engines.transformers import to_quantization_config
from gemma_tune.exporting.verify.forms import Form
from gemma_tune.exporting.verify.parity import Logits
from gemma_tune.models.tokenizer import load_tokenizer, with_one_bos
from gemma_tune.recipe.schema import ModelSection


class TransformersForm:
    """A transformers or PEFT model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Logits:
        logits: Logits = self.model(input_ids=torch.tensor([list(token_ids)])).logits[0].float().numpy()
        return logits

    def tokenize(self, text: str) -> list[int]:
        return with_one_bos(self.tokenizer, text)

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]) -> list[int]:
        input_ids = torch.tensor([list(prompt)])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_token_ids), pad_token_id=0
        )
        output = self.model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer[:-1] if answer and answer[-1] in stop_token_ids else answer


def open_plain(form: Form, *, before: TransformersForm | None) -> TransformersForm:
    """A directory in float32, with the weights that 4-bit ones stand for."""
    return _with_adapter(form, before.model if before else _expand(_load(form.path, dtype="float32")))


def open_nf4(form: Form, *, before: TransformersForm | None) -> TransformersForm:
    """16-bit weights quantised to NF4 as `engines` does it for training."""
    return _with_adapter(form, before.model if before else _load_nf4(form))


def open_nf4_expanded(form: Form, *, before: TransformersForm | None) -> TransformersForm:
    """The weights that NF4 stands for, in float32: the base that a 4-bit run's adapter was really trained on."""
    return _with_adapter(form, before.model if before else _expand(_load_nf4(form)).float())


def _load(directory: Path, *, dtype: str, **options: Any) -> Any:
    attention = choose_attention(directory, asked="auto")
    if attention is not None:
        options["attn_implementation"] = attention
    return AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=getattr(torch, dtype),
        device_map={"": "cpu"},
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        **options,
    )


def _load_nf4(form: Form) -> Any:
    section = ModelSection(load_in_4bit=True)
    quantization = to_quantization_config(section, compute=getattr(torch, form.dtype))
    model = _load(form.path, dtype=form.dtype, quantization_config=quantization)
    keep_trainable_layout(model)
    return model


def _expand(model: Any) -> Any:
    """Replace each 4-bit layer by a plain one with the weights that its codes stand for."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = weight.float()
            if module.bias is not None:
                plain.bias.data = module.bias.data.float()
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, plain)
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = model.is_loaded_in_4bit = False
    return model


def _with_adapter(form: Form, model: Any) -> TransformersForm:
    assert form.tokenizer is not None, "a form of transformers has a tokenizer directory"
    if form.num_rows is not None and form.num_rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(form.num_rows, mean_resizing=False)
    if form.adapter is not None:
        model = load_adapter(model, form.adapter)
    return TransformersForm(model, load_tokenizer(form.tokenizer))
