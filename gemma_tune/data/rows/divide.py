"""Which rows are equal, which are held out, and in which order they stand: decided by hashes of rows and a seed alone.

Rows are numbers here, and what is known of each lies in flat arrays, so that a million rows take a few megabytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma_tune.data.encode.arrays import Ints
from gemma_tune.errors import DataError

KEY_BYTES = 16


@dataclass(frozen=True, eq=False)
class RowKeys:
    """What the keys of rows say."""

    numbers: Ints  # [num_rows]; equal where the rows are equal
    places: npt.NDArray[np.float64]  # [num_rows], in [0, 1); where the seed puts a row and its equals

    @classmethod
    def of(cls, keys: bytes | bytearray, *, seed: int) -> RowKeys:
        """Read keys of KEY_BYTES that stand one behind the other."""
        prefix = f"gemma-tune split {seed}:".encode()
        split = (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
        places = [int.from_bytes(hashlib.sha256(prefix + key).digest()[:6], "big") / 2**48 for key in split]
        return cls(number_keys(keys), np.array(places, dtype=np.float64))

    def firsts(self, rows: Ints) -> Ints:
        """Leave out the rows that are equal to an earlier one of `rows`; the order stays."""
        return firsts_of(rows, self.numbers)

    def ordered(self, rows: Ints) -> Ints:
        """Sort rows by their places."""
        return rows[np.argsort(self.places[rows], kind="stable")]

    def are_among(self, rows: Ints) -> npt.NDArray[np.bool_]:
        """Tell for every row whether one of `rows` is equal to it: [num_rows]."""
        return np.isin(self.numbers, self.numbers[rows])

    def held_out(self, *, fraction: float) -> npt.NDArray[np.bool_]:
        """Hold out the rows whose place is below `fraction`, at least one distinct row on each side: [num_rows].

        Raises a DataError where there is only one distinct row.
        """
        if fraction == 0:
            return np.zeros(len(self.numbers), dtype=np.bool_)
        distinct = self.ordered(self.firsts(np.arange(len(self.numbers))))
        if len(distinct) < 2:
            raise DataError(
                "there is only one distinct row, so none can be held out",
                hint="set data.eval_fraction=0, or give more rows",
            )
        num_eval = int((self.places[distinct] < fraction).sum())
        return self.are_among(distinct[: min(max(num_eval, 1), len(distinct) - 1)])


def number_keys(keys: bytes | bytearray) -> Ints:
    """Number keys of KEY_BYTES that stand one behind the other: [num_rows], from 0; equal keys have one number."""
    halves = np.frombuffer(keys, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    is_new = np.ones(len(order), dtype=np.int64)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    return numbers


def firsts_of(rows: Ints, numbers: Ints) -> Ints:
    """Leave out the rows whose number is that of an earlier one of `rows`; the order stays."""
    return rows[np.sort(np.unique(numbers[rows], return_index=True)[1])]
