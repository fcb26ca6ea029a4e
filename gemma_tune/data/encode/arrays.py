"""Encoded rows in flat arrays: five bytes a token, sliced without copies, mapped from a file when they are cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from gemma_tune.data.data_report import LengthBin

IGNORED = -100  # cross-entropy's ignore_index: a token without loss

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as the model gets it."""

    input_ids: list[int]  # the BOS, then the row, which ends with a stop token
    labels: list[int]  # of the same length; the token's own id where it is in the loss, -100 elsewhere (not shifted)


@dataclass(frozen=True, eq=False)
class EncodedRows(Sequence[EncodedRow]):
    """Rows over two flat arrays; row `i` is `[starts[i] : starts[i] + lengths[i]]` of both. Rows may share tokens."""

    token_ids: npt.NDArray[np.int32]  # int32 [num_tokens]; possibly a read-only memory map
    supervised: npt.NDArray[np.bool_]  # bool [num_tokens]; whether a token is in the loss
    starts: Ints  # int64 [num_rows]
    lengths: Ints  # int64 [num_rows], in tokens

    @classmethod
    def from_rows(cls, rows: Iterable[EncodedRow]) -> EncodedRows:
        """Gather rows of lists."""
        rows = list(rows)
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        token_ids = np.array([token_id for row in rows for token_id in row.input_ids], dtype=np.int32)
        labels = np.array([label for row in rows for label in row.labels], dtype=np.int32)
        return cls(token_ids, labels != IGNORED, starts_of(lengths), lengths)

    @classmethod
    def join(cls, parts: Iterable[EncodedRows]) -> EncodedRows:
        """Parts behind one another, each of them without gaps (as `from_rows` makes them)."""
        parts = list(parts) or [cls.from_rows(())]
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.supervised for part in parts]),
            starts_of(lengths),
            lengths,
        )

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedRows: ...
    def __getitem__(self, index: int | slice) -> EncodedRow | EncodedRows:
        if isinstance(index, slice):
            return EncodedRows(self.token_ids, self.supervised, self.starts[index], self.lengths[index])
        ids, supervised = self.arrays(index)
        return EncodedRow(ids.tolist(), np.where(supervised, ids, IGNORED).tolist())

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))

    def arrays(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids and supervised flags of one row, each [lengths[index]], as views."""
        start = self.starts[index]
        part = slice(start, start + self.lengths[index])
        return self.token_ids[part], self.supervised[part]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; a row that occurs twice counts twice."""
        return int(self.lengths.sum())

    def num_supervised(self) -> Ints:
        """Tokens in the loss of each row, [num_rows]."""
        total = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return total[self.starts + self.lengths] - total[self.starts]


def starts_of(lengths: Ints) -> Ints:
    """Where each row starts when rows of these lengths stand behind one another."""
    return np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)


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
