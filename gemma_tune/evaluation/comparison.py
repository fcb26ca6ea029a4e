"""What a comparison found, as it is stored and shown."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_tune.runs.evaluation import Estimate

# Two labels, in the order of the comparison.
Pair = tuple[str, str]
# Of each pair, by prompt: 1 where the first of the pair wins, 0 where the second does, 1/2 for a tie.
Scores = Mapping[Pair, Mapping[str, float]]


@dataclass(frozen=True)
class PairResult:
    """One model against another on some prompts."""

    first: str
    second: str
    group: str | None  # the prompts' group; None: all of them
    wins: int  # wins, ties, losses: prompts, as seen from `first`
    ties: int
    losses: int
    win_rate: Estimate | None  # the share of wins, a tie counting half; None where nothing was judged


@dataclass(frozen=True)
class PassRate:
    """How many of the prompts with rules a model answered by the rules. `group` None: all of them."""

    label: str
    group: str | None
    prompts: int
    passed: Estimate


@dataclass(frozen=True)
class Rating:
    """Bradley-Terry points: 400 more are odds of 10 to 1, the mean of the field is 1000."""

    label: str
    points: Estimate


@dataclass(frozen=True)
class JudgeFacts:
    """How the judge behaved."""

    name: str
    prompt: str | None  # what a judge model is asked, with gaps; None for rules and for a person
    duels: int  # pairs of answers in one order that were ruled on; `expected`: how many there are
    expected: int
    malformed: int  # rulings without a verdict; their pairs are not counted
    # the share of clear verdicts that went to the answer shown first; 50 % is without a bias
    first_preferred: Estimate | None
    consistent: Estimate | None  # the share of pairs on which the two orders gave the same verdict


@dataclass(frozen=True)
class ComparedPrompt:
    """One prompt with everything that was found."""

    id: str
    group: str
    prompt: str
    reference: str | None
    answers: tuple[str, ...]  # of each model, in the order of the labels
    broken: tuple[tuple[str, ...], ...] | None  # the rules that each answer breaks; None where the prompt has no rules
    scores: tuple[tuple[str, str, float], ...]  # of each pair as (first, second, score), where it was judged


@dataclass(frozen=True)
class Comparison:
    """Everything. Groups come after the figures of all prompts; `ratings` is empty for two models."""

    labels: tuple[str, ...]
    prompts_label: str
    judge: JudgeFacts
    pairs: tuple[PairResult, ...]
    ratings: tuple[Rating, ...]
    passes: tuple[PassRate, ...]
    questions: tuple[ComparedPrompt, ...]


def format_share(estimate: Estimate | None) -> str:
    """`62.5 % [48.1, 75.0]`; `—` where there is nothing."""
    return "—" if estimate is None else estimate.format(lambda value: f"{value * 100:.1f}", unit=" %")


def format_points(estimate: Estimate) -> str:
    """`1,084 [1,010, 1,162]`."""
    return estimate.format(lambda value: f"{value:,.0f}")
