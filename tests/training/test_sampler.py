"""The row order: complete, repeatable by seed and epoch, even batches, the longest first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.training.sampler import EpochSampler


def order(lengths: list[int], *, batch_size: int = 4, seed: int = 0, epoch: int = 0, group: bool = True) -> list[int]:
    sampler = EpochSampler(lengths, batch_size=batch_size, seed=seed, group_by_length=group)
    sampler.set_epoch(epoch)
    return list(sampler)


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
