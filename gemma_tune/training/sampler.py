"""The order of the rows, a function of seed and epoch alone: a resumed run sees what it would have seen (LEAF)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Rows are sorted by length within pools of this many batches: large enough that a batch is nearly even (under 10 %
# padding on dolly-like lengths, against over 50 % in random batches of 8), small enough that the batches of an epoch
# stay a random draw.
BATCHES_PER_POOL = 32


class EpochSampler(Sampler[int]):
    """Row indices for one epoch after another.

    transformers' own length grouping draws from the global random state, which a resumed process does not have (F35).

    Args:
        lengths: tokens of each row.
        batch_size: rows of a forward pass.
        seed: decides the order, together with the epoch.
        group_by_length: batches of rows of similar length; the longest batch comes first, so that a run that does not
            fit into memory says so at its first step (F39).
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, group_by_length: bool) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch, also when it resumes in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_by_length:
            return iter(order)
        batches = self._batches(order)
        # A short last batch must stay the last one, or the borders of all others would move.
        tail = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        if batches:
            longest = max(range(len(batches)), key=lambda index: sum(self.lengths[row] for row in batches[index]))
            first = batches.pop(longest)
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [first, *(batches[index] for index in shuffled)]
        return iter([row for batch in batches + tail for row in batch])

    def _batches(self, order: list[int]) -> list[list[int]]:
        """Cut the order into pools, sort each by length, and cut it into batches; only the last one may be short."""
        pool_rows = self.batch_size * BATCHES_PER_POOL
        pools = [order[start : start + pool_rows] for start in range(0, len(order), pool_rows)]
        rows = [row for pool in pools for row in sorted(pool, key=lambda row: self.lengths[row], reverse=True)]
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
