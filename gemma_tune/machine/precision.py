"""Which precision a machine computes Gemma in, and why.

`torch.cuda.is_bf16_supported()` says yes on a T4 because it counts emulation, so the compute capability decides
(https://github.com/unslothai/unsloth/issues/2783). Gemma's residual stream passes float16's 65504, so float16 is only
used with the embeddings, the norms and the adapter kept in float32 (https://github.com/huggingface/transformers/issues/39972).
"""

from dataclasses import dataclass
from typing import Literal

from gemma_tune.errors import EngineError
from gemma_tune.machine.device import Device

Dtype = Literal["bfloat16", "float16", "float32"]
MIN_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Precision:
    """What is computed in which precision."""

    compute: Dtype  # precision of the matrix products; 4-bit weights are expanded to it
    storage: Dtype  # precision of the weights that are not quantised (embeddings, norms, or all of them)
    # mixed precision that the trainer switches on: bf16, fp16 (with loss scaling) or none
    autocast: Literal["bf16", "fp16"] | None
    reason: str  # why, in words for the user


def decide_precision(requested: str, *, device: Device) -> Precision:
    """Resolve `model.dtype` on a device.

    Raises:
        EngineError: the request would be emulated or would overflow on this device.
    """
    return _on_cpu(requested, device) if device.kind == "cpu" else _on_cuda(requested, device)


def _on_cpu(requested: str, device: Device) -> Precision:
    if requested == "float16":
        raise EngineError(
            "model.dtype=float16 does not train on a CPU: there is no float16 arithmetic with loss scaling",
            hint="use model.dtype=auto",
        )
    if requested == "bfloat16" or (requested == "auto" and device.has_amx_bf16):
        why = (
            "the processor has AMX bfloat16 units"
            if device.has_amx_bf16
            else "the recipe asks for it; without AMX it is emulated and slow"
        )
        return Precision("bfloat16", "bfloat16", "bf16", why)
    # Measured on an AVX512-BF16 processor without AMX: 20 steps in bfloat16 took 118 s, in float32 6 s.
    return Precision(
        "float32",
        "float32",
        None,
        "the recipe asks for it" if requested == "float32" else "this processor has no AMX bfloat16 units",
    )


def _on_cuda(requested: str, device: Device) -> Precision:
    capability = device.compute_capability or (0, 0)
    version = f"{device.name} has compute capability {capability[0]}.{capability[1]}"
    real_bf16 = capability >= MIN_BF16_CAPABILITY
    if requested == "bfloat16" and not real_bf16:
        raise EngineError(
            f"model.dtype=bfloat16 would be emulated: {version}, bfloat16 needs 8.0", hint="use model.dtype=auto"
        )
    if requested == "float32":
        return Precision("float32", "float32", None, "the recipe asks for it")
    if requested == "float16" or not real_bf16:
        why = "the recipe asks for float16" if requested == "float16" else f"{version}, bfloat16 needs 8.0"
        return Precision(
            "float16",
            "float32",
            "fp16",
            f"{why}; embeddings, norms and adapter stay in float32, as Gemma overflows float16",
        )
    return Precision("bfloat16", "bfloat16", "bf16", "the recipe asks for it" if requested == "bfloat16" else version)
