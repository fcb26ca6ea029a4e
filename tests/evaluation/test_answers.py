from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.evaluation.answers import spread_over_categories


@dataclass(frozen=True)
class Row:
    category: str | None
    number: int


def test_questions_are_spread_over_the_categories() -> None:
    rows = [Row(category, number) for number, category in enumerate("aaabbac")]
    assert [row.number for row in spread_over_categories(rows, count=2)] == [0, 3]
    assert [row.number for row in spread_over_categories(rows, count=5)] == [0, 3, 6, 1, 2]
    assert len(spread_over_categories(rows, count=20)) == 7
    assert spread_over_categories([], count=3) == []
