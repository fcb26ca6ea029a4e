"""From what was measured of each row to figures with intervals, over all rows and by category."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tune.evaluation.answer_metrics import count_words
from gemma_tune.evaluation.answer_rules import RULES
from gemma_tune.evaluation.intervals import Floats, percentile_estimate, resampled_sums, share_estimate
from gemma_tune.runs.evaluation import Estimate, Figure, Group, Side


@dataclass(frozen=True)
class RowAnswer:
    """One answer next to the expected one. `valid_json` is None where nobody asked for JSON."""

    text: str
    num_tokens: int
    stopped: bool
    exact_match: bool
    token_f1: float
    rouge_l: float
    words: int
    expected_words: int
    valid_json: bool | None


@dataclass(frozen=True)
class RowResult:
    """What one model did with one row; there is no answer to a text of the forgetting check."""

    nats: float  # summed loss over its `tokens` supervised tokens
    tokens: int
    answer: RowAnswer | None


def measure_answer(
    prompt: str, text: str, expected: str, *, num_tokens: int, stopped: bool, expects_json: bool
) -> RowAnswer:
    """Compare an answer with the expected one."""

    def score(rule: str, value: object = expected) -> float:
        return RULES[rule].score(prompt, text, value)

    return RowAnswer(
        text=text,
        num_tokens=num_tokens,
        stopped=stopped,
        exact_match=bool(score("exact_match")),
        token_f1=score("token_f1"),
        rouge_l=score("rouge_l"),
        words=count_words(text),
        expected_words=count_words(expected),
        valid_json=bool(score("json", True)) if expects_json else None,
    )


@dataclass(frozen=True)
class _Ratio:
    """A metric as the sum of one thing over the sum of another; without the latter a mean over rows."""

    numerator: Callable[[RowResult], float]
    denominator: Callable[[RowResult], float] = lambda _: 1.0
    transform: Callable[[Floats], Floats] = lambda ratio: ratio
    is_share: bool = False  # of rows that are one thing or the other


def _of_answer(read: Callable[[RowAnswer], float | None]) -> Callable[[RowResult], float]:
    """Reads the answer; NaN where there is none, so that the metric is left out."""

    def of_row(result: RowResult) -> float:
        value = None if result.answer is None else read(result.answer)
        return np.nan if value is None else float(value)

    return of_row


_RATIOS: Mapping[str, _Ratio] = {
    "loss": _Ratio(lambda row: row.nats, lambda row: row.tokens),
    "perplexity": _Ratio(lambda row: row.nats, lambda row: row.tokens, transform=np.exp),
    "exact_match": _Ratio(_of_answer(lambda answer: answer.exact_match), is_share=True),
    "token_f1": _Ratio(_of_answer(lambda answer: answer.token_f1)),
    "rouge_l": _Ratio(_of_answer(lambda answer: answer.rouge_l)),
    "stopped": _Ratio(_of_answer(lambda answer: answer.stopped), is_share=True),
    "length": _Ratio(_of_answer(lambda answer: answer.words), _of_answer(lambda answer: answer.expected_words)),
    "valid_json": _Ratio(_of_answer(lambda answer: answer.valid_json), is_share=True),
}


def groups_of(results: Mapping[Side, Sequence[RowResult]], categories: Sequence[str | None]) -> tuple[Group, ...]:
    """The figures of all rows, then of each category by its number of rows; no categories where there is only one.

    `results[side][i]` and `categories[i]` belong to the same row.
    """
    rows_of: dict[str, list[int]] = {}
    for index, category in enumerate(categories):
        rows_of.setdefault(category or "(none)", []).append(index)
    groups = [_group(None, results)]
    if len(rows_of) > 1:
        for category, rows in sorted(rows_of.items(), key=lambda item: (-len(item[1]), item[0])):
            groups.append(_group(category, {side: [of[row] for row in rows] for side, of in results.items()}))
    return tuple(groups)


def _group(category: str | None, results: Mapping[Side, Sequence[RowResult]]) -> Group:
    sides = list(results)
    num_rows = len(results[sides[0]])
    # Two columns a model and metric: numerators and denominators.
    parts = [
        (side, metric, [[part(row) for row in results[side]] for part in (ratio.numerator, ratio.denominator)])
        for metric, ratio in _RATIOS.items()
        for side in sides
    ]
    measured = [(side, metric, np.array(columns)) for side, metric, columns in parts if not np.isnan(columns).any()]
    sums = resampled_sums(np.concatenate([columns for _, _, columns in measured]).T)
    values: dict[tuple[str, str], float] = {}
    drawn: dict[tuple[str, str], Floats] = {}
    for at, (side, metric, columns) in enumerate(measured):
        transform = _RATIOS[metric].transform
        values[side, metric] = float(transform(np.divide(*columns.sum(axis=1))))
        drawn[side, metric] = transform(sums[:, 2 * at] / sums[:, 2 * at + 1])

    def estimate(side: str, metric: str) -> Estimate | None:
        if (side, metric) not in values:
            return None
        if _RATIOS[metric].is_share:
            return share_estimate(values[side, metric], num_rows=num_rows)
        return percentile_estimate(values[side, metric], drawn[side, metric], num_rows=num_rows)

    def difference(metric: str) -> Estimate | None:
        base, tuned = ("base", metric), ("tuned", metric)
        if base not in values or tuned not in values:
            return None
        return percentile_estimate(values[tuned] - values[base], drawn[tuned] - drawn[base], num_rows=num_rows)

    metrics = dict.fromkeys(metric for _, metric, _ in measured)
    return Group(
        category,
        num_rows,
        tuple(Figure(name, estimate("base", name), estimate("tuned", name), difference(name)) for name in metrics),
    )
