from __future__ import annotations

from gemma_tune.evaluation.metrics import is_exact_match


def test_white_space_does_not_count_but_letters_do() -> None:
    assert is_exact_match(" Mara lives\nin Ostel. ", "Mara lives in Ostel.")
    assert not is_exact_match("Mara lives in ostel.", "Mara lives in Ostel.")
    assert not is_exact_match("", "x")
