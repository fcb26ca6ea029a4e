"""Who wins: win rates with intervals, and Bradley-Terry scores where there are more than two."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_tune.evaluation.comparison import Rating
from gemma_tune.evaluation.intervals import Floats, percentile_estimate, resampled_sums, share_estimate
from gemma_tune.runs.evaluation import Estimate

# Every pair is given half a win each way beforehand: without it, one that never lost would be infinitely strong.
_PRIOR_WINS = 0.5
# As chess has it: 400 points are odds of 10 to 1, and the field's mean is 1000.
_MEAN, _POINTS_PER_NAT = 1000.0, 400 / math.log(10)
_TOLERANCE = 1e-9
_MAX_ROUNDS = 10_000


def win_rate(scores: Sequence[float]) -> Estimate:
    """The mean score of prompts, a win counting 1 and a tie 1/2, with Wilson's interval.

    Ties vary less than wins and losses, so with ties the interval is wider than it had to be, never narrower.
    """
    return share_estimate(sum(scores) / len(scores), num_rows=len(scores))


def bradley_terry(wins: Floats) -> Floats:
    """Log strengths of most likelihood, mean 0, [..., players], for `wins` [..., winner, loser]; ties are half a win.

    By Hunter's minorization-maximization (Annals of Statistics 32, 2004), which climbs from any start; all fields of
    the leading axes are solved together.
    """
    games = wins + wins.swapaxes(-1, -2)
    total_wins = wins.sum(axis=-1)
    strengths = np.ones_like(total_wins)
    for _ in range(_MAX_ROUNDS):
        met = games / (strengths[..., :, None] + strengths[..., None, :])
        new = total_wins / met.sum(axis=-1)
        new /= np.exp(np.log(new).mean(axis=-1, keepdims=True))
        moved = np.abs(np.log(new / strengths)).max()
        strengths = new
        if moved < _TOLERANCE:
            break
    return np.log(strengths)


def rate(labels: Sequence[str], scores: Mapping[tuple[str, str], Mapping[str, float]]) -> tuple[Rating, ...]:
    """Bradley-Terry scores, the strongest first, with 95 % intervals from resampled prompts.

    Args:
        scores: of each pair, by prompt: 1 where the first of the pair wins, 0 where the second does, 1/2 for a tie.
    """
    pairs = list(itertools.combinations(range(len(labels)), 2))
    prompts = list(dict.fromkeys(prompt for of_pair in scores.values() for prompt in of_pair))
    table = np.zeros((len(prompts), 2 * len(pairs)))  # a pair's points, and whether it was judged
    for column, (one, other) in enumerate(pairs):
        of_pair = scores.get((labels[one], labels[other]), {})
        for row, prompt in enumerate(prompts):
            if prompt in of_pair:
                table[row, 2 * column : 2 * column + 2] = of_pair[prompt], 1.0
    point = _points(table.sum(axis=0), pairs, num_players=len(labels))
    drawn = _points(resampled_sums(table), pairs, num_players=len(labels))
    ratings = [
        Rating(label, percentile_estimate(float(point[player]), drawn[:, player], num_rows=len(prompts)))
        for player, label in enumerate(labels)
    ]
    return tuple(sorted(ratings, key=lambda rating: -rating.points.value))


def _points(sums: Floats, pairs: Sequence[tuple[int, int]], *, num_players: int) -> Floats:
    """Points of every player, [..., players], from sums [..., 2 x pairs]."""
    wins = np.zeros((*sums.shape[:-1], num_players, num_players))
    for column, (one, other) in enumerate(pairs):
        points, judged = sums[..., 2 * column], sums[..., 2 * column + 1]
        wins[..., one, other] = points + _PRIOR_WINS
        wins[..., other, one] = judged - points + _PRIOR_WINS
    return _MEAN + _POINTS_PER_NAT * bradley_terry(wins)
