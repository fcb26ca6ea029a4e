"""What `gemma-tune evaluate` found of a run, as it is stored in evaluation.json and shown."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemma_tune.disk import read_json, write_json
from gemma_tune.runs.layout import RunDir

Side = Literal["base", "tuned"]
SIDES: tuple[Side, ...] = ("base", "tuned")


@dataclass(frozen=True)
class Metric:
    """A figure over rows."""

    label: str  # as it is shown
    # how a value is written: `share` in percent, `number` with three digits behind the point
    form: Literal["share", "number"]
    better: Literal["higher", "lower"] | None  # where it should move; None: it only describes


METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss, nats a token", "number", "lower"),
    "perplexity": Metric("perplexity", "number", "lower"),
    "exact_match": Metric("exact match", "share", "higher"),
    "token_f1": Metric("token F1", "share", "higher"),
    "rouge_l": Metric("ROUGE-L", "share", "higher"),
    "stopped": Metric("stops by itself", "share", "higher"),
    "length": Metric("length, answer / expected", "number", None),
    "valid_json": Metric("valid JSON", "share", "higher"),
}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are None where there is one row only."""

    value: float
    low: float | None
    high: float | None

    def format(self, number: Callable[[float], str], *, unit: str = "") -> str:
        """Write the value and, where there is one, its interval: `62.5 % [48.1, 75.0]`."""
        value = number(self.value) + unit
        if self.low is None or self.high is None:
            return value
        return f"{value} [{number(self.low)}, {number(self.high)}]"


@dataclass(frozen=True)
class Figure:
    """One metric of one group of rows. `difference` is tuned minus base on the same rows, where both were measured."""

    metric: str
    base: Estimate | None
    tuned: Estimate | None
    difference: Estimate | None

    @property
    def verdict(self) -> Literal["better", "worse"] | None:
        """Where the difference lies beyond doubt: its whole interval is on one side of 0."""
        better = METRICS[self.metric].better
        if better is None or self.difference is None or self.difference.low is None or self.difference.high is None:
            return None
        if self.difference.low <= 0 <= self.difference.high:
            return None
        return "better" if (self.difference.low > 0) == (better == "higher") else "worse"


@dataclass(frozen=True)
class Group:
    """The figures of some rows: of all of them (`category` None), or of those of one category."""

    category: str | None
    rows: int
    figures: tuple[Figure, ...]

    def figure(self, metric: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.metric == metric), None)


@dataclass(frozen=True)
class Evaluation:
    """What was found."""

    made: str  # when, in UTC
    key: dict[str, Any]  # everything that decides the figures; another key means that they must be made again
    rows_label: str  # where the rows come from
    rows: tuple[Group, ...]  # the groups, all rows first
    general: tuple[Group, ...]  # the same over the forgetting check's texts, with loss and perplexity only
    general_label: str  # what those texts are


def write_evaluation(run: RunDir, evaluation: Evaluation) -> None:
    write_json(run.evaluation, asdict(evaluation))


def read_evaluation(run: RunDir) -> Evaluation | None:
    """The stored evaluation of a run, or None.

    Raises:
        RunError: its file is damaged.
    """
    if not run.evaluation.is_file():
        return None
    from pydantic import TypeAdapter

    return TypeAdapter(Evaluation).validate_python(read_json(run.evaluation))


def format_estimate(estimate: Estimate | None, *, metric: str, signed: bool = False) -> str:
    """`88.7 % [81.6, 93.3]`; a difference with its sign; `—` where nothing was measured."""
    if estimate is None:
        return "—"
    is_share = METRICS[metric].form == "share"

    def number(value: float) -> str:
        scaled = value * 100 if is_share else value
        digits = 1 if is_share or abs(scaled) >= 100 else 3
        return f"{scaled:{'+' if signed else ''},.{digits}f}"

    return estimate.format(number, unit=" %" if is_share and not signed else "")  # a difference of shares is in points
