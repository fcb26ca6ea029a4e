"""The cards that a plan can be made for, whose rows are in cards.toml, and the one in this machine."""

import re
import shutil
from dataclasses import dataclass, replace

from gemma_tune.errors import EngineError
from gemma_tune.machine.child import Ended, run_command
from gemma_tune.machine.device import Device
from gemma_tune.paths import read_table
from gemma_tune.text import suggestion

_MIB = 2**20
_GIB = 2**30
# Of the total, the driver keeps some for itself: a T4 of 15,360 MiB has 14.748 GiB for PyTorch (Unsloth's notebooks).
_USABLE = 0.98
_SMI_SECONDS = 10.0  # without its daemon a driver starts anew for each call


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


CARDS: dict[str, Card] = {
    key: Card(row["name"], row["mib"] * _MIB, tuple(row["capability"]), row["tera_flops"], row["gigabytes_per_second"])
    for key, row in read_table("machine/cards.toml").items()
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
    try:
        done = run_smi("--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
    except OSError:
        return None
    return parse_smi(done.stdout) if done is not None and done.code == 0 else None


def run_smi(*arguments: str) -> Ended | None:
    """Run `nvidia-smi`; None where there is none, OSError where it cannot be started."""
    program = shutil.which("nvidia-smi")
    return None if program is None else run_command([program, *arguments], seconds=_SMI_SECONDS)


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
