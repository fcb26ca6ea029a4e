"""Figures over answers, in plain Python."""

from __future__ import annotations


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether two texts are equal apart from white space at their ends and its amount inside."""
    return answer.split() == expected.split()
