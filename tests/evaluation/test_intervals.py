"""Intervals against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gemma_tune.evaluation.intervals import NUM_DRAWS, percentile_estimate, resampled_sums, share_estimate


def test_resamples_have_as_many_rows_as_there_are() -> None:
    sums = resampled_sums(np.ones((37, 1)))
    assert sums.shape == (NUM_DRAWS, 1)
    assert (sums == 37).all()


def test_many_rows_are_drawn_piece_by_piece_and_just_as_often() -> None:
    sums = resampled_sums(np.ones((1_001, 1)))
    assert sums.shape == (NUM_DRAWS, 1)
    assert (sums == 1_001).all()


@pytest.mark.parametrize("num_rows", [5, 40, 300])
def test_percentiles_of_a_ratio_and_of_a_paired_difference_are_scipys(num_rows: int) -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(2, 60, num_rows).astype(float)
    first = generator.gamma(2.0, 1.0, num_rows) * tokens
    second = first * generator.uniform(0.3, 0.6, num_rows)
    sums = resampled_sums(np.stack([first, second, tokens], axis=1))
    ratio = percentile_estimate(first.sum() / tokens.sum(), sums[:, 0] / sums[:, 2], num_rows=num_rows)
    paired = percentile_estimate(0.0, (sums[:, 1] - sums[:, 0]) / sums[:, 2], num_rows=num_rows)

    def scipys(statistic) -> tuple[float, float, float]:  # type: ignore[no-untyped-def]
        found = stats.bootstrap(
            (first, second, tokens), statistic, paired=True, method="percentile", n_resamples=20_000,
            vectorized=True, rng=np.random.default_rng(9),
        )  # fmt: skip
        return found.confidence_interval.low, found.confidence_interval.high, found.standard_error

    low, high, error = scipys(lambda a, b, n, axis: a.sum(axis) / n.sum(axis))
    assert ratio.low == pytest.approx(low, abs=error / 10)
    assert ratio.high == pytest.approx(high, abs=error / 10)
    low, high, error = scipys(lambda a, b, n, axis: (b - a).sum(axis) / n.sum(axis))
    assert paired.low == pytest.approx(low, abs=error / 10)
    assert paired.high == pytest.approx(high, abs=error / 10)


@pytest.mark.parametrize(("hits", "num_rows"), [(0, 115), (115, 115), (102, 115), (1, 2), (7, 8)])
def test_shares_have_wilsons_interval(hits: int, num_rows: int) -> None:
    wilson = stats.binomtest(hits, num_rows).proportion_ci(0.95, method="wilson")
    found = share_estimate(hits / num_rows, num_rows=num_rows)
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))


def test_one_row_has_no_interval() -> None:
    assert percentile_estimate(1.5, np.full(10, 1.5), num_rows=1).low is None
    assert share_estimate(1.0, num_rows=1).high is None
