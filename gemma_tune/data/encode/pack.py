"""Rows into packs: sequences of at most so many tokens that hold several rows, with hardly a token left empty."""

import numpy as np

from gemma_tune.data.encode.arrays import Ints
from gemma_tune.errors import DataError


def pack_rows(lengths: Ints, *, capacity: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Best fit, decreasing: the longest row first, each into the fullest pack that still takes it.

    Seed and epoch decide which of several rows of one length comes first, and nothing else does. So an epoch's packs
    can be made again at any time, other epochs mix other rows, and all of them have the same number of packs, with the
    same lengths in them.

    Args:
        lengths: tokens of each row, [num_rows].
        capacity: tokens of a full pack.

    Returns:
        The row numbers of each pack; every row is in one pack.

    Raises:
        DataError: a row is longer than a pack. It would have to be cut, and no answer is cut unseen.
    """
    require_rows_fit(lengths, capacity=capacity)
    shuffled = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # the packs with exactly so many tokens left
    spaces = 0  # bit i is set where with_space[i] is not empty, so that the best fit is the lowest bit of a shift
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        left = space - length
        if left:
            with_space[left].append(pack)
            spaces |= 1 << left
    return [tuple(pack) for pack in packs]


def require_rows_fit(lengths: Ints, *, capacity: int) -> None:
    """Refuse rows that are longer than a pack; the DataError has the longest and the setting that would take it."""
    too_long = int((lengths > capacity).sum())
    if too_long:
        longest = int(lengths.max())
        raise DataError(
            f"{too_long:,} of {len(lengths):,} rows are longer than a pack of {capacity:,} tokens; "
            f"the longest has {longest:,}",
            hint=f"set training.pack_tokens={longest}, or data.max_seq_tokens={capacity}",
        )
