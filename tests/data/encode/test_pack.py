"""Packs: complete, full, repeatable, mixed anew every epoch, as many every epoch, made at once."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.encode.arrays import Ints
from gemma_tune.data.encode.pack import pack_rows
from gemma_tune.errors import DataError


def dolly_like(count: int, *, longest: int) -> Ints:
    drawn = np.random.default_rng(0).lognormal(math.log(120), 0.9, count)
    return np.clip(drawn, 8, longest).astype(np.int64)


def loads(packs: list[tuple[int, ...]], *, lengths: Ints) -> list[int]:
    return [int(lengths[list(pack)].sum()) for pack in packs]


@given(lengths=st.lists(st.integers(1, 50), max_size=120), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_row_is_in_one_pack_that_holds_it(lengths: list[int], seed: int, epoch: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    packs = pack_rows(array, capacity=50, seed=seed, epoch=epoch)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    found = loads(packs, lengths=array)
    assert all(0 < load <= 50 for load in found)
    # No two packs could be one: otherwise the row that opened the later pack would have gone into the earlier.
    assert sum(load <= 25 for load in found) <= 1
    assert packs == pack_rows(array, capacity=50, seed=seed, epoch=epoch)


def naive_best_fit(lengths: list[int], *, capacity: int) -> list[list[int]]:
    """By the definition: look at every pack."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_a_row_goes_into_the_fullest_pack_that_takes_it(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    found = loads(pack_rows(array, capacity=50, seed=0, epoch=0), lengths=array)
    assert sorted(found) == sorted(sum(pack) for pack in naive_best_fit(lengths, capacity=50))


@given(lengths=st.lists(st.integers(1, 50), max_size=120), order=st.randoms(use_true_random=False))
def test_the_packs_have_the_same_lengths_whatever_the_order(lengths: list[int], order: object) -> None:
    def shapes(values: list[int], *, epoch: int) -> list[list[int]]:
        array = np.array(values, dtype=np.int64)
        packs = pack_rows(array, capacity=50, seed=0, epoch=epoch)
        return sorted(sorted(array[list(pack)].tolist()) for pack in packs)

    mixed = list(lengths)
    order.shuffle(mixed)  # type: ignore[attr-defined]
    assert shapes(lengths, epoch=0) == shapes(lengths, epoch=1) == shapes(mixed, epoch=0)


@pytest.mark.parametrize("capacity", [1024, 2048])
def test_packs_of_dolly_like_rows_are_full(capacity: int) -> None:
    lengths = dolly_like(15_000, longest=min(capacity, 2048))
    packs = pack_rows(lengths, capacity=capacity, seed=0, epoch=0)
    assert lengths.sum() / (len(packs) * capacity) >= 0.97


def test_epochs_mix_other_rows() -> None:
    lengths = dolly_like(15_000, longest=1024)
    first, second = ({*pack_rows(lengths, capacity=1024, seed=0, epoch=epoch)} for epoch in (0, 1))
    assert len(first & second) < 0.25 * len(first)  # unique long rows keep their likewise unique neighbours


def test_fifteen_thousand_rows_pack_at_once() -> None:
    lengths = dolly_like(15_000, longest=2048)
    seconds = []
    for epoch in range(3):
        start = time.perf_counter()
        pack_rows(lengths, capacity=2048, seed=0, epoch=epoch)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_a_row_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(
        DataError, match="1 of 3 rows are longer than a pack of 50 tokens; the longest has 51"
    ) as caught:
        pack_rows(np.array([3, 51, 50]), capacity=50, seed=0, epoch=0)
    assert caught.value.hint == "set training.pack_tokens=51, or data.max_seq_tokens=50"
