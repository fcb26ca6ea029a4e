"""The order of the rows, a function of seed and epoch alone: a resumed run sees what it would have seen (LEAF)."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from gemma_tune.data.encode.arrays import Ints
from gemma_tune.data.encode.pack import pack_rows

# Groups are sorted by length within pools of this many batches: large enough that a batch is nearly even (under 10 %
# padding on dolly-like lengths, against over 50 % in random batches of 8), small enough that the batches of an epoch
# stay a random draw.
BATCHES_PER_POOL = 32

# The row numbers of one sequence: a single row, or a pack. Without rows it fills up a batch of another process.
Group = tuple[int, ...]


class EpochSampler(Sampler[Group]):
    """Groups of row numbers for one epoch after another. Every row is in one group; all epochs have as many groups.

    transformers' own length grouping draws from the global random state, which a resumed process does not have (F35).

    Args:
        lengths: tokens of each row, [num_rows].
        batch_size: groups of a forward pass of one process.
        seed: decides the order and the packs, together with the epoch.
        group_by_length: batches of groups of similar length; the longest batch comes first, so that a run that does not
            fit into memory says so at its first step (F39).
        pack_tokens: length in tokens of the packs that rows are joined into; None leaves each row on its own.
        num_processes: whose forward passes make one step. `batch_size` groups for the first follow on those for the
            second and so on, as accelerate deals them out, and all of them are what one process with a batch as large
            would have. Where the rows run out a process gets empty groups, never a row twice.
    """

    def __init__(
        self,
        lengths: Ints,
        *,
        batch_size: int,
        seed: int,
        group_by_length: bool,
        pack_tokens: int | None = None,
        num_processes: int = 1,
    ) -> None:
        self.lengths = lengths
        self.num_processes = num_processes
        self.batch_size = batch_size * num_processes  # of all processes
        self.seed = seed
        self.group_by_length = group_by_length
        self.pack_tokens = pack_tokens
        self.epoch = 0
        num_groups = len(self._groups())
        self._num_groups = num_groups if num_processes == 1 else -(-num_groups // self.batch_size) * self.batch_size

    def __len__(self) -> int:
        return self._num_groups

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch, also when it resumes in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Group]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = self._groups()
        order: list[int] = torch.randperm(len(groups), generator=generator).tolist()
        if not self.group_by_length:
            return self._dealt(groups, self._cut(order))
        row_lengths = self.lengths.tolist()
        lengths = [sum(row_lengths[row] for row in group) for group in groups]
        batches = self._batches(order, lengths=lengths)
        # A short last batch must stay the last one, or the borders of all others would move.
        tail = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        if batches:
            longest = max(range(len(batches)), key=lambda number: sum(lengths[index] for index in batches[number]))
            first = batches.pop(longest)
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [first, *(batches[number] for number in shuffled)]
        return self._dealt(groups, batches + tail)

    def longest(self, count: int) -> list[Group]:
        """The `count` longest groups of the epoch, longest first."""
        row_lengths = self.lengths.tolist()
        return sorted(self._groups(), key=lambda group: sum(row_lengths[row] for row in group), reverse=True)[:count]

    def _groups(self) -> list[Group]:
        if self.pack_tokens is None:
            return [(row,) for row in range(len(self.lengths))]
        return pack_rows(self.lengths, capacity=self.pack_tokens, seed=self.seed, epoch=self.epoch)

    def _batches(self, order: list[int], *, lengths: list[int]) -> list[list[int]]:
        """Cut the order into pools, sort each by length, and cut it into batches; only the last one may be short."""
        pool_size = self.batch_size * BATCHES_PER_POOL
        pools = [order[start : start + pool_size] for start in range(0, len(order), pool_size)]
        ordered = [index for pool in pools for index in sorted(pool, key=lambda index: lengths[index], reverse=True)]
        return self._cut(ordered)

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _dealt(self, groups: list[Group], batches: list[list[int]]) -> Iterator[Group]:
        """The groups of each batch, process by process, so that all get about as many tokens."""
        share = self.batch_size // self.num_processes
        for batch in batches:
            for process in range(self.num_processes):
                mine = batch[process :: self.num_processes]
                yield from (groups[index] for index in mine)
                if self.num_processes > 1:
                    yield from ((),) * (share - len(mine))
