"""What is true of quantised layers in every engine (LEAF)."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from gemma_tune.errors import EngineError


def require_quantized(model: torch.nn.Module, *, wanted: bool) -> int:
    """Return the number of quantised layers; refuse a model that did not become what the recipe asks.

    Unsloth's CPU backend falls back to 16 bits with a printed line only, for example for layers narrower than 64.
    """
    found = sum(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules())
    if wanted and not found:
        raise EngineError(
            "model.load_in_4bit or load_in_8bit is set, but no layer could be quantised on this machine",
            hint="use model.load_in_4bit=false, or a model with layers of at least 64 columns",
        )
    if found and not wanted:
        raise EngineError(
            f"the model's files are already quantised ({found} layers), but the recipe asks for 16 bits",
            hint="name the 16-bit model, or set model.load_in_4bit=true",
        )
    return found


def keep_trainable_layout(model: torch.nn.Module) -> None:
    """Keep 4-bit weights in the layout whose backward pass is right.

    bitsandbytes 0.50 repacks a Linear4bit in place for its AVX512-BF16 kernel at the first forward pass without
    gradients and never unpacks it, so one evaluation before training makes every later gradient wrong. Remove when
    bitsandbytes unpacks, or refuses the backward pass.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit) and hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
