"""Win rates, and Bradley-Terry scores against scipy's optimizer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from gemma_tune.evaluation.intervals import Floats
from gemma_tune.evaluation.ratings import bradley_terry, rate, win_rate


def test_a_win_rate_counts_ties_half() -> None:
    scores = [1.0] * 6 + [0.5] * 2 + [0.0] * 2
    found = win_rate(scores)
    assert found.value == 0.7
    wanted = scipy.stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def logistic_strengths(wins: Floats) -> Floats:
    """The same model as a logistic regression: a row a game, +1 and -1 for its players, no intercept."""
    num_players = len(wins)

    def loss(free: Floats) -> float:
        strengths = np.concatenate([[0.0], free])
        total = 0.0
        for one, other in itertools.permutations(range(num_players), 2):
            total += wins[one, other] * np.logaddexp(0.0, strengths[other] - strengths[one])
        return total

    found = scipy.optimize.minimize(loss, np.zeros(num_players - 1), method="BFGS", options={"gtol": 1e-9})
    strengths = np.concatenate([[0.0], found.x])
    return strengths - strengths.mean()


@pytest.mark.parametrize("num_players", [2, 3, 5])
def test_bradley_terry_equals_a_logistic_regression(num_players: int) -> None:
    wins = np.random.default_rng(num_players).integers(0, 40, (num_players, num_players)) / 2 + 0.5
    np.fill_diagonal(wins, 0)
    assert bradley_terry(wins) == pytest.approx(logistic_strengths(wins), abs=1e-4)


def test_two_players_are_the_log_odds() -> None:
    strengths = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3))


def test_many_fields_at_once_are_each_alone() -> None:
    wins = np.random.default_rng(0).integers(1, 9, (50, 4, 4)).astype(float)
    wins[:, range(4), range(4)] = 0
    assert bradley_terry(wins) == pytest.approx(np.array([bradley_terry(each) for each in wins]), abs=1e-6)


def drawn_scores(strengths: list[float], *, num_prompts: int, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    generator = np.random.default_rng(seed)
    labels = [f"m{index}" for index in range(len(strengths))]
    return {
        (labels[one], labels[other]): {
            f"p{prompt}": float(generator.random() < 1 / (1 + math.exp(strengths[other] - strengths[one])))
            for prompt in range(num_prompts)
        }
        for one, other in itertools.combinations(range(len(strengths)), 2)
    }


def test_points_and_their_intervals() -> None:
    strengths = [0.8, 0.0, -0.8]
    ratings = rate(["m0", "m1", "m2"], drawn_scores(strengths, num_prompts=200, seed=1))
    assert [rating.label for rating in ratings] == ["m0", "m1", "m2"]
    assert sum(rating.points.value for rating in ratings) == pytest.approx(3000)
    for rating, strength in zip(ratings, strengths, strict=True):
        points = rating.points
        assert points.low is not None and points.high is not None
        assert points.low < 1000 + strength * 400 / math.log(10) < points.high
        assert points.low < points.value < points.high


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    strengths = [0.5, 0.0, -0.5]
    truth = {f"m{index}": 1000 + strength * 400 / math.log(10) for index, strength in enumerate(strengths)}
    held = [
        rating.points.low <= truth[rating.label] <= rating.points.high  # type: ignore[operator]
        for seed in range(20)
        for rating in rate(list(truth), drawn_scores(strengths, num_prompts=60, seed=seed))
    ]
    assert sum(held) / len(held) >= 0.85


def test_one_that_never_loses_has_finite_points() -> None:
    prompts = [f"p{index}" for index in range(10)]
    scores = {pair: dict.fromkeys(prompts, 1.0) for pair in (("a", "b"), ("a", "c"))} | {("b", "c"): {}}
    best, *others = rate(["a", "b", "c"], scores)
    assert best.label == "a" and 1000 < best.points.value < 2000
    assert others[0].points.value == pytest.approx(others[1].points.value)
