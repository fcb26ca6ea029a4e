"""Which precision a machine computes in: decided by compute capability, never by what a card emulates."""

from __future__ import annotations

import pytest

from gemma_tune.errors import EngineError
from gemma_tune.machine.device import Device
from gemma_tune.machine.precision import decide_precision

T4 = Device("cuda", "Tesla T4", (7, 5), 15_000_000_000)
L4 = Device("cuda", "NVIDIA L4", (8, 9), 24_000_000_000)
CPU = Device("cpu", "Xeon")
AMX = Device("cpu", "Xeon 8481C", has_amx_bf16=True)


@pytest.mark.parametrize(
    ("device", "requested", "compute", "storage", "autocast"),
    [
        (L4, "auto", "bfloat16", "bfloat16", "bf16"),
        (L4, "float16", "float16", "float32", "fp16"),
        (L4, "float32", "float32", "float32", None),
        (T4, "auto", "float16", "float32", "fp16"),
        (T4, "float32", "float32", "float32", None),
        (CPU, "auto", "float32", "float32", None),
        (CPU, "bfloat16", "bfloat16", "bfloat16", "bf16"),
        (AMX, "auto", "bfloat16", "bfloat16", "bf16"),
        (AMX, "float32", "float32", "float32", None),
    ],
)
def test_decisions(device: Device, requested: str, compute: str, storage: str, autocast: str | None) -> None:
    precision = decide_precision(requested, device=device)
    assert (precision.compute, precision.storage, precision.autocast) == (compute, storage, autocast)
    assert precision.reason


def test_a_t4_never_gets_bfloat16_nor_plain_float16() -> None:
    with pytest.raises(EngineError, match=r"would be emulated: Tesla T4 has compute capability 7\.5"):
        decide_precision("bfloat16", device=T4)
    assert decide_precision("float16", device=T4).storage == "float32"


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(EngineError, match="does not train on a CPU"):
        decide_precision("float16", device=CPU)
