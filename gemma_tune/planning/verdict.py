"""What a plan says: the parts of the memory, what they come to on a card, and what would make a recipe fit."""

from dataclasses import dataclass
from typing import Literal

from gemma_tune.machine.cards import Card
from gemma_tune.planning.schedule import Schedule

Verdict = Literal["fits", "tight", "does not fit"]

# Not measured by us: a CUDA context with cuBLAS, bitsandbytes and Triton. See docs/planning.md.
CONTEXT_BYTES = 480 * 2**20
# Reserved after loading beyond the weights: 0.55 to 0.67 GiB in four of Unsloth's notebooks (docs/planning.md).
LOADING_BYTES = 610 * 2**20
# The allocator holds blocks that no tensor fills; batches of changing lengths make more of them.
FRAGMENTATION = 0.10
# How far the counted parts may be off: weights are exact, what lives during a step is not.
_RESIDENT_UNCERTAINTY = 0.02
_STEP_UNCERTAINTY = 0.25
_CONTEXT_UNCERTAINTY = 0.5


@dataclass(frozen=True)
class Part:
    """Some bytes, and the formula they come from."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Change:
    """Settings under which a recipe fits, as `section.field=value`."""

    overrides: tuple[str, ...]
    verdict: Verdict | None  # verdict, need_bytes: of the card with them
    need_bytes: int
    slowdown: float  # time of the run with them over the time without
    learns_the_same: bool  # False where rank, length or model change, and with them what is learned


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    model: str
    num_params: int
    num_trained: int
    card: Card | None
    engine: str
    compute: str
    resident: tuple[Part, ...]  # on the card all the time, from the first step on
    moments: tuple[Part, ...]  # what comes on top of it at one moment of a run; the largest decides
    context_bytes: int  # context_bytes, margin_bytes: CUDA itself, and blocks that the allocator cannot fill
    margin_bytes: int
    host: tuple[Part, ...]  # host, disk: parts of the machine's memory and disk, which add up
    disk: tuple[Part, ...]
    exports: tuple[Part, ...]  # what each export would write; those that the recipe names are in `disk`
    schedule: Schedule
    changes: tuple[Change, ...]  # what would make it fit, where it does not

    @property
    def resident_bytes(self) -> int:
        return sum(part.bytes for part in self.resident)

    @property
    def peak(self) -> Part:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` should say, if loading leaves nothing allocated."""
        return self.resident_bytes - LOADING_BYTES + self.peak.bytes

    @property
    def need_bytes(self) -> int:
        """What the card has to have free."""
        return self.resident_bytes + self.peak.bytes + self.margin_bytes + self.context_bytes

    @property
    def uncertainty_bytes(self) -> int:
        """To either side of `need_bytes`."""
        return round(
            _RESIDENT_UNCERTAINTY * self.resident_bytes
            + _STEP_UNCERTAINTY * self.peak.bytes
            + _CONTEXT_UNCERTAINTY * self.context_bytes
        )

    @property
    def verdict(self) -> Verdict | None:
        """None without a card."""
        if self.card is None:
            return None
        if self.need_bytes > self.card.usable_bytes:
            return "does not fit"
        return "tight" if self.need_bytes + self.uncertainty_bytes > self.card.usable_bytes else "fits"

    @property
    def line(self) -> str:
        """The verdict in a line, for the start of a training."""
        need = f"{self.need_bytes / 1e9:.1f} GB (± {self.uncertainty_bytes / 1e9:.1f})"
        if self.card is None:
            return f"plan: needs {need} on a card"
        return f"plan: {self.verdict}: needs {need} of the {self.card.usable_bytes / 1e9:.1f} GB of {self.card.name}"
