"""The device that trains: the first CUDA card, else the processor."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Device:
    """The device that trains: `kind` cpu or cuda; `compute_capability` and `memory_bytes` of a CUDA card, else None."""

    kind: Literal["cpu", "cuda"]
    name: str
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    has_amx_bf16: bool = False


def detect_device() -> Device:
    """Return the first CUDA card, else this machine's processor."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            kind="cuda",
            name=properties.name,
            compute_capability=(properties.major, properties.minor),
            memory_bytes=properties.total_memory,
        )
    facts = _cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Device(kind="cpu", name=name, has_amx_bf16="amx_bf16" in facts.get("flags", "").split())


def _cpu_facts() -> dict[str, str]:
    """Return Linux's facts of the first processor; elsewhere none are known and float32 is taken."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    first = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
