"""How far two forms of a model are apart, what is expected of a format, and the verdict. NumPy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma_tune.paths import read_table

Logits = npt.NDArray[np.float32]

_CLEAR_LEAD = 0.1


@dataclass(frozen=True)
class Distance:
    """How far the logits of one form are from those that are wanted, over all positions."""

    max_abs: float  # max_abs, rms: of the differences of single logits
    top1_agreement: float  # share of positions with the same most likely token, 0 to 1
    clear_top1: float  # the same among positions where the wanted token leads by 0.1 or more: a tie is no preference
    mean_kl: float  # mean KL(wanted || found) in nats a position
    rms: float


@dataclass(frozen=True)
class Limits:
    """What a format may lose; None where nothing is asked. NaN is never allowed."""

    expected: str  # the same in words
    max_abs: float | None = None  # the largest difference of a logit
    # root mean square of the differences, as a share of what the adapter changes
    max_share_of_effect: float | None = None
    min_top1: float | None = None  # of `clear_top1`; max_kl: of `mean_kl`
    max_kl: float | None = None


LIMITS = {name: Limits(**row) for name, row in read_table("exporting/verify/limits.toml").items()}


def distance(wanted: Logits, found: Logits, *, positions: Sequence[int]) -> Distance:
    """Compare logits (tokens, vocabulary) at some positions, one at a time in float64: memory for one of them.

    A NaN on either side makes the figures that it touches NaN.
    """
    rows = np.empty((len(positions), 5))
    for index, position in enumerate(positions):
        want, have = wanted[position].astype(np.float64), found[position].astype(np.float64)
        log_want, log_have = _log_softmax(want), _log_softmax(have)
        difference = np.abs(want - have)
        kl = (np.exp(log_want) * (log_want - log_have)).sum()
        second, first = np.partition(want, -2)[-2:]
        same = want.argmax() == have.argmax()
        rows[index] = difference.max(), same, first - second, kl, np.square(difference).mean()
    is_clear = rows[:, 2] >= _CLEAR_LEAD
    return Distance(
        max_abs=float(rows[:, 0].max()),
        top1_agreement=float(rows[:, 1].mean()),
        clear_top1=float(rows[is_clear, 1].mean()) if is_clear.any() else 1.0,
        mean_kl=float(rows[:, 3].mean()),
        rms=float(np.sqrt(rows[:, 4].mean())),
    )


def perplexity(logits: Logits, targets: Sequence[tuple[int, int]]) -> float:
    """exp of the mean loss over (position, id of the next token); NaN where there is none."""
    losses = [-_log_softmax(logits[position].astype(np.float64))[token] for position, token in targets]
    return float(np.exp(np.mean(losses))) if losses else float("nan")


def _log_softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = values - values.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def judge(drift: Distance, effect: Distance, limits: Limits) -> tuple[bool, str]:
    """Passed or not, and why. NaN fails every comparison below, hence the form `not x <= limit`."""
    if not effect.rms > 0.0:
        return False, "the adapter does not change the base on these rows: was it trained, and do its names fit?"
    share = drift.rms / effect.rms
    if not share < float("inf"):
        return False, "the logits are NaN or infinite"
    if limits.max_abs is not None and not drift.max_abs <= limits.max_abs:
        return False, f"logits differ by {drift.max_abs:.2g}, at most {limits.max_abs:.0e} is expected"
    if limits.max_share_of_effect is not None and not share <= limits.max_share_of_effect:
        return False, (
            f"the logits moved by {share:.0%} of the adapter's effect, at most {limits.max_share_of_effect:.0%} is "
            "expected: a wrong export, or an adapter so weak that only float32 keeps it"
        )
    if limits.min_top1 is not None and not drift.clear_top1 >= limits.min_top1:
        return (
            False,
            f"top-1 agreement without near ties is {drift.clear_top1:.1%}, at least {limits.min_top1:.0%} is expected",
        )
    if limits.max_kl is not None and not drift.mean_kl <= limits.max_kl:
        return False, f"mean KL is {drift.mean_kl:.2g}, at most {limits.max_kl:g} is expected"
    return True, f"the logits moved by {share:.2%} of the adapter's effect"
