from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gemma_tune.data.rows.divide import RowKeys, number_keys
from gemma_tune.errors import DataError


def _keys(*texts: str) -> bytes:
    return b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)


def test_equal_keys_have_one_number_and_others_another() -> None:
    zeros = bytes(15)
    numbers = number_keys(_keys("b", "a", "b", "c", "a", "b") + zeros + b"\1" + b"\1" + zeros).tolist()
    assert numbers[0] == numbers[2] == numbers[5] and numbers[1] == numbers[4]
    assert sorted(set(numbers)) == list(range(5))
    assert number_keys(b"").tolist() == []


def test_firsts_keep_the_given_order() -> None:
    keys = RowKeys.of(_keys("b", "a", "b", "c", "a", "b"), seed=0)
    assert keys.firsts(np.arange(6)).tolist() == [0, 1, 3]
    assert keys.firsts(np.array([5, 4, 3, 2, 1])).tolist() == [5, 4, 3]
    assert keys.are_among(np.array([4])).tolist() == [False, True, False, False, True, False]


def test_equal_rows_are_held_out_together_and_no_side_is_empty() -> None:
    texts = [f"row {number % 50}" for number in range(100)]
    keys = RowKeys.of(_keys(*texts), seed=0)
    is_eval = keys.held_out(fraction=0.2)
    assert is_eval[:50].tolist() == is_eval[50:].tolist() and 3 <= is_eval[:50].sum() <= 20
    assert is_eval.tolist() == (keys.places < 0.2).tolist()
    assert keys.held_out(fraction=1e-9).sum() == 2 and (~keys.held_out(fraction=1 - 1e-9)).sum() == 2
    assert not keys.held_out(fraction=0).any()
    with pytest.raises(DataError, match="only one distinct row"):
        RowKeys.of(_keys("a", "a"), seed=0).held_out(fraction=0.5)
