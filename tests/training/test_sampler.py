"""The row order, alone or in packs: complete, repeatable by seed and epoch, even batches, the longest first."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.training.sampler import EpochSampler, Group


def groups(
    lengths: list[int],
    *,
    batch_size: int = 4,
    seed: int = 0,
    epoch: int = 0,
    group: bool = True,
    pack_tokens: int | None = None,
) -> list[Group]:
    sampler = EpochSampler(
        np.array(lengths), batch_size=batch_size, seed=seed, group_by_length=group, pack_tokens=pack_tokens
    )
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def order(lengths: list[int], **settings: Any) -> list[int]:
    return [row for (row,) in groups(lengths, **settings)]


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    batch_size=st.integers(1, 16),
    group=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_an_epoch(lengths: list[int], batch_size: int, group: bool, epoch: int) -> None:
    found = order(lengths, batch_size=batch_size, group=group, epoch=epoch)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(lengths, batch_size=batch_size, group=group, epoch=epoch)


@pytest.mark.parametrize("group", [True, False])
def test_epochs_and_seeds_differ(group: bool) -> None:
    lengths = list(range(1, 101))
    orders = [order(lengths, seed=seed, epoch=epoch, group=group) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(found) for found in orders}) == 4


def test_grouping_saves_padding_and_starts_with_the_longest_batch() -> None:
    generator = random.Random(0)
    lengths = [int(generator.lognormvariate(5, 0.8)) + 1 for _ in range(1501)]

    def real_share(found: list[int]) -> float:
        batches = [[lengths[row] for row in found[start : start + 8]] for start in range(0, len(found), 8)]
        return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)

    grouped = order(lengths, batch_size=8)
    assert real_share(grouped) > 0.9
    assert real_share(order(lengths, batch_size=8, group=False)) < 0.5
    sums = [sum(lengths[row] for row in grouped[start : start + 8]) for start in range(0, 1496, 8)]
    assert sums[0] == max(sums)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200), batch_size=st.integers(1, 5), group=st.booleans()
)
def test_every_row_is_in_one_pack_and_every_epoch_has_as_many(lengths: list[int], batch_size: int, group: bool) -> None:
    epochs = [groups(lengths, batch_size=batch_size, group=group, epoch=epoch, pack_tokens=64) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2]
    assert len({len(packs) for packs in epochs}) == 1
    for packs in epochs:
        assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
        assert all(sum(lengths[row] for row in pack) <= 64 for pack in packs)


def test_packs_come_in_even_batches_with_the_longest_first() -> None:
    generator = random.Random(1)
    lengths = [generator.randint(20, 60) for _ in range(101)]
    packs = groups(lengths, batch_size=4, pack_tokens=64)
    tokens = [sum(lengths[row] for row in pack) for pack in packs]
    whole = len(packs) // 4 * 4
    sums = [sum(tokens[start : start + 4]) for start in range(0, whole, 4)]
    assert sums[0] == max(sums)
    orders = [groups(lengths, seed=seed, epoch=epoch, pack_tokens=64) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(found) for found in orders}) == 4
