"""Lengths of rows, summed up."""

from __future__ import annotations

import numpy as np

from gemma_tune.data.data_report import LengthBin
from gemma_tune.data.encode.arrays import Ints


def length_bins(lengths: Ints) -> tuple[LengthBin, ...]:
    """Count rows in bins that end at powers of two and half-way between (… 64, 96, 128, …), shortest to longest row."""
    if not len(lengths):
        return ()
    num_powers = max(1, int(lengths.max()).bit_length() - 3)
    ends = np.array([end for power in range(4, 4 + num_powers) for end in (2**power, 3 * 2 ** (power - 1))])
    counts = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends))
    first, last = np.flatnonzero(counts)[[0, -1]].tolist()
    lows = [0, *(ends + 1).tolist()]
    return tuple(LengthBin(lows[at], int(ends[at]), int(counts[at])) for at in range(first, last + 1))


def percentile(lengths: Ints, percent: int) -> int:
    """Find the smallest value that at least `percent` % of the values do not exceed; 0 of nothing."""
    return int(np.percentile(lengths, percent, method="inverted_cdf")) if len(lengths) else 0
