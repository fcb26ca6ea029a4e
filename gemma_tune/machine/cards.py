"""The cards that a plan can be made for, and the one in this machine.

Memory is what `nvidia-smi` reports as total (MiB). Peak rates are dense tensor-core rates in the 16-bit format that the
card trains in, from NVIDIA's data sheets; a consumer card's rate is the one with 32-bit accumulation.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace

from gemma_tune.errors import EngineError
from gemma_tune.machine.child import run_command
from gemma_tune.machine.device import Device
from gemma_tune.text import suggestion

_MIB = 2**20
_GIB = 2**30
# Of the total, the driver keeps some for itself: a T4 of 15,360 MiB has 14.748 GiB for PyTorch (Unsloth's notebooks).
_USABLE = 0.98
_SMI_SECONDS = 5.0


@dataclass(frozen=True)
class Card:
    """A CUDA card. Rates are None where only the memory is known."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    tera_flops: float | None
    gigabytes_per_second: float | None

    @property
    def device(self) -> Device:
        """The device that a training on this card would find."""
        return Device("cuda", self.name, self.compute_capability, self.memory_bytes)

    @property
    def usable_bytes(self) -> int:
        """What a process can allocate, its CUDA context included."""
        return int(self.memory_bytes * _USABLE)


def _card(name: str, mib: int, capability: tuple[int, int], tera_flops: float, bandwidth: float) -> Card:
    return Card(name, mib * _MIB, capability, tera_flops, bandwidth)


CARDS: dict[str, Card] = {
    "t4": _card("T4", 15_360, (7, 5), 65, 320),
    "v100": _card("V100", 16_384, (7, 0), 125, 900),
    "l4": _card("L4", 23_034, (8, 9), 121, 300),
    "a10": _card("A10", 23_028, (8, 6), 125, 600),
    "a100-40": _card("A100 40GB", 40_960, (8, 0), 312, 1555),
    "a100-80": _card("A100 80GB", 81_920, (8, 0), 312, 2039),
    "l40s": _card("L40S", 46_068, (8, 9), 362, 864),
    "h100": _card("H100 80GB", 81_559, (9, 0), 989, 3350),
    "h200": _card("H200", 143_771, (9, 0), 989, 4800),
    "rtx-3060": _card("RTX 3060 12GB", 12_288, (8, 6), 25, 360),
    "rtx-3090": _card("RTX 3090", 24_576, (8, 6), 71, 936),
    "rtx-4060-ti": _card("RTX 4060 Ti 16GB", 16_380, (8, 9), 44, 288),
    "rtx-4070": _card("RTX 4070", 12_282, (8, 9), 58, 504),
    "rtx-4080": _card("RTX 4080", 16_376, (8, 9), 97, 717),
    "rtx-4090": _card("RTX 4090", 24_564, (8, 9), 165, 1008),
    "rtx-5080": _card("RTX 5080", 16_303, (12, 0), 113, 960),
    "rtx-5090": _card("RTX 5090", 32_607, (12, 0), 210, 1792),
}
# What a table over cards shows: one of each size of memory.
TABLE_CARDS = ("rtx-3060", "t4", "l4", "rtx-4090", "rtx-5090", "a100-40", "h100")


def find_card(text: str) -> Card:
    """A card by name (`t4`, `RTX 4090`), or one with a given memory (`GB=12`, meaning GiB).

    Raises:
        EngineError: no such card, or no such amount of memory.
    """
    size = re.fullmatch(r"\s*gb\s*=\s*(\S+)\s*", text, re.IGNORECASE)
    if size:
        return _card_of_size(size.group(1))
    name = _slug(text)
    if name in CARDS:
        return CARDS[name]
    raise EngineError(
        f"--gpu: no card is known by the name {text!r}{suggestion(name, CARDS)}",
        hint=f"known: {', '.join(CARDS)}; for another one give its memory, for example --gpu GB=12",
    )


def _card_of_size(text: str) -> Card:
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 1 <= gigabytes <= 1024:
        raise EngineError(f"--gpu: GB={text} is not a memory from 1 to 1024", hint="for example --gpu GB=12")
    # Compute capability 8.0: the oldest that computes in bfloat16, as every card but T4 and V100 does.
    return Card(f"{gigabytes:g} GB card", int(gigabytes * _GIB), (8, 0), None, None)


def _slug(text: str) -> str:
    words = re.sub(r"nvidia|geforce|tesla|-(sxm\d?|pcie|hbm\d?e?)|sxm\d", " ", text.lower())
    words = re.sub(r"(\d+)\s*gb", r"\1", words)
    return re.sub(r"[\s_-]+", "-", words.strip())


def detect_card() -> Card | None:
    """The first card that `nvidia-smi` lists; None where there is none, or no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = run_command(query, seconds=_SMI_SECONDS)
    except OSError:
        return None
    return parse_smi(done.stdout) if done.code == 0 else None


def parse_smi(output: str) -> Card | None:
    """The first line of `nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits`."""
    lines = output.strip().splitlines()
    found = re.fullmatch(r"(.+),\s*(\d+),\s*(\d+)\.(\d+)", lines[0].strip()) if lines else None
    if found is None:
        return None
    name, mib, major, minor = found.groups()
    slug = _slug(name)
    memory = int(mib) * _MIB
    # "NVIDIA H100 80GB HBM3" has more words than the key h100. A laptop's chip shares a name with a faster card.
    known = next((card for key, card in CARDS.items() if slug == key or slug.startswith(f"{key}-")), None)
    if known is None or "laptop" in slug:
        return Card(name, memory, (int(major), int(minor)), None, None)
    return replace(known, name=name.removeprefix("NVIDIA "), memory_bytes=memory)
