"""Figures over answers, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether two texts are equal apart from white space at their ends and its amount inside."""
    return answer.split() == expected.split()


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers, 0 to 1, that match exactly.

    Raises:
        ValueError: the lengths differ, or there is nothing to compare.
    """
    if not answers:
        raise ValueError("no answers to compare")
    return sum(is_exact_match(a, e) for a, e in zip(answers, expected, strict=True)) / len(answers)
