from __future__ import annotations

import pytest

from gemma_tune.evaluation.metrics import exact_match, is_exact_match


def test_white_space_does_not_count_but_letters_do() -> None:
    assert is_exact_match(" Mara lives\nin Ostel. ", "Mara lives in Ostel.")
    assert not is_exact_match("Mara lives in ostel.", "Mara lives in Ostel.")
    assert not is_exact_match("", "x")


def test_share() -> None:
    assert exact_match(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.75
    with pytest.raises(ValueError, match="no answers"):
        exact_match([], [])
    with pytest.raises(ValueError):
        exact_match(["a"], ["a", "b"])
