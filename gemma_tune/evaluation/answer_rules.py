"""Exact rules that an answer keeps or breaks, without a judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.errors import DataError
from gemma_tune.evaluation.metrics import count_words, is_json
from gemma_tune.text import did_you_mean

# A refusal says so at its beginning. Phrases of English models; a refusal in other words counts as an answer.
_REFUSAL_CHARS = 300
_REFUSAL = re.compile(
    r"\b(?:i|we)(?:'m| am|'re| are)? (?:cannot|can't|can not|won't|will not|must decline|decline|refuse|"
    r"(?:not able|unable|not going|not willing) to|not comfortable)\b"
    r"|\b(?:i'm|i am) sorry,? but\b|\bagainst (?:my|the) (?:guidelines|policy|policies|principles)\b"
    r"|\bas an ai\b[^.]*\b(?:cannot|can't|not able)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Rule:
    """One kind of rule: what its value may be, as a test and in words, and whether an answer keeps it."""

    accepts: Callable[[Any], bool]
    takes: str
    holds: Callable[[str, Any], bool]


def has_words(answer: str, text: str) -> bool:
    """Whether a text occurs in an answer as whole words, whatever their case; a number not as a part of another one."""
    pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(text)}(?![.,]?\d)(?!\w)"
    return re.search(pattern, answer, re.IGNORECASE) is not None


def is_refusal(answer: str) -> bool:
    """Whether an answer begins by declining, in one of the usual English phrases."""
    return _REFUSAL.search(answer[:_REFUSAL_CHARS].replace("’", "'")) is not None


def _count_lines(answer: str) -> int:
    return sum(bool(line.strip()) for line in answer.splitlines())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        and 0 <= value[0] <= value[1]
    )


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


def _has_json(answer: str, keys: bool | list[str]) -> bool:
    if not is_json(answer):
        return False
    value = json.loads(answer)
    return keys is True or (isinstance(value, dict) and set(keys) <= set(value))  # type: ignore[arg-type]


_TEXTS, _RANGE = "a list of texts", "[least, most]"
RULES: Mapping[str, _Rule] = {
    "contains": _Rule(_is_texts, _TEXTS, lambda answer, texts: any(has_words(answer, text) for text in texts)),
    "contains_all": _Rule(_is_texts, _TEXTS, lambda answer, texts: all(has_words(answer, text) for text in texts)),
    "excludes": _Rule(_is_texts, _TEXTS, lambda answer, texts: not any(has_words(answer, text) for text in texts)),
    "regex": _Rule(
        _is_pattern, "a regular expression of Python", lambda answer, pattern: re.search(pattern, answer) is not None
    ),
    "json": _Rule(
        lambda value: value is True or _is_texts(value), "true, or the keys that the object needs", _has_json
    ),
    "words": _Rule(_is_range, _RANGE, lambda answer, span: span[0] <= count_words(answer) <= span[1]),
    "lines": _Rule(_is_range, _RANGE, lambda answer, span: span[0] <= _count_lines(answer) <= span[1]),
    "refuses": _Rule(
        lambda value: isinstance(value, bool), "true or false", lambda answer, wanted: is_refusal(answer) is wanted
    ),
}


def check_rules(rules: object, *, where: str) -> dict[str, Any]:
    """The rules of a prompt, once they are known to be rules.

    Raises:
        DataError: they are no mapping, one of them does not exist, or its value is not what it takes.
    """
    if not isinstance(rules, Mapping):
        raise DataError(f"{where}: rules is no mapping", hint=f'for example {{"contains": ["Canberra"]}}; {_known()}')
    for name, value in rules.items():
        if name not in RULES:
            near = did_you_mean(str(name), RULES)
            raise DataError(f"{where}: there is no rule {name!r}" + (f"; {near}" if near else ""), hint=_known())
        if not RULES[name].accepts(value):
            raise DataError(f"{where}: the rule {name} has the value {value!r}", hint=f"it takes {RULES[name].takes}")
    return dict(rules)


def broken_rules(rules: Mapping[str, Any], answer: str) -> list[str]:
    """The names of the rules that an answer breaks."""
    return [name for name, value in rules.items() if not RULES[name].holds(answer, value)]


def _known() -> str:
    return f"rules: {', '.join(RULES)}"
