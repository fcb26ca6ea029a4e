"""How sure a figure over rows is: 95 % intervals, by resampling the rows."""

import math

import numpy as np
import numpy.typing as npt

from gemma_tune.runs.evaluation import Estimate

Floats = npt.NDArray[np.float64]

NUM_DRAWS = 10_000
_SEED = 0
_TAILS = (2.5, 97.5)
_Z = 1.959963984540054  # the normal distribution's 97.5 % point
_MAX_DRAWN = 4_000_000  # numbers drawn at once: 32 MB


def resampled_sums(table: Floats) -> Floats:
    """Sums of the columns of `table` [num_rows, num_columns] over resamples of its rows, [NUM_DRAWS, num_columns].

    All columns of a row are drawn together, so that what is computed from two of them is paired.
    """
    num_rows = len(table)
    generator = np.random.default_rng(_SEED)
    chance = np.full(num_rows, 1 / num_rows)
    sums = []
    for start in range(0, NUM_DRAWS, step := max(1, _MAX_DRAWN // num_rows)):
        # How often each row occurs in a resample: the same as drawing row numbers with replacement.
        times = generator.multinomial(num_rows, chance, size=min(step, NUM_DRAWS - start))
        sums.append(times @ table)
    return np.concatenate(sums)


def percentile_estimate(value: float, resampled: Floats, *, num_rows: int) -> Estimate:
    """A value with the percentile interval of its resampled values; none for a single row, which cannot vary."""
    if num_rows < 2:
        return Estimate(value, None, None)
    low, high = np.percentile(resampled, _TAILS)
    return Estimate(value, float(low), float(high))


def share_estimate(share: float, *, num_rows: int) -> Estimate:
    """A share of rows with Wilson's score interval (1927).

    Resampling 0 of 115 rows gives 0 each time, an interval without width; Wilson's has one at 0 % and 100 % as well.
    """
    if num_rows < 2:
        return Estimate(share, None, None)
    spread = _Z * math.sqrt(share * (1 - share) / num_rows + _Z**2 / (4 * num_rows**2))
    middle = share + _Z**2 / (2 * num_rows)
    scale = 1 + _Z**2 / num_rows
    # Rounding may leave 0 % and 100 % by 1e-17.
    return Estimate(share, min(share, (middle - spread) / scale), max(share, (middle + spread) / scale))
