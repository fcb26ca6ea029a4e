"""Rules that an answer is held against, without a judge."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.errors import DataError
from gemma_tune.evaluation.answer_metrics import count_words, is_exact_match, is_json, rouge_l, token_f1
from gemma_tune.machine.child import LimitedChild
from gemma_tune.members import Members
from gemma_tune.text import shorten, suggestion

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
class AnswerRule:
    """One kind of rule."""

    name: str
    # a pure function of prompt, answer and what the rule expects: 1 where the answer keeps it, 0 where not
    score: Callable[[str, str, Any], float]
    accepts: Callable[[Any], bool]  # accepts, takes: what may be expected, as a test and in words
    takes: str
    is_graded: bool = False  # whether the score may lie between 0 and 1; such a rule is neither kept nor broken


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
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


_SEARCH_SECONDS = 2  # of computing


@functools.cache
def _searcher() -> LimitedChild:
    return LimitedChild(f"{__name__}:open_search", {}, cpu_seconds=_SEARCH_SECONDS, memory_bytes=400_000_000)


def open_search() -> Callable[[str, str], bool]:
    """Return what searches a text, for a `LimitedChild`."""
    return lambda pattern, text: re.search(pattern, text) is not None


def _has_match(_: str, answer: str, pattern: str) -> bool:
    """Search in a process under limits: `(a+)+$` takes for ever, and nothing in this one could stop it."""
    end = _searcher().call(pattern=pattern, text=answer)
    if not end.has_result:
        raise DataError(
            f"the rule regex {shorten(pattern, num_chars=100)!r} takes more than {_SEARCH_SECONDS} seconds of "
            "computing to search an answer",
            hint="write it without a repetition inside of a repetition",
        )
    return bool(end.result)


def _has_json(answer: str, keys: bool | list[str]) -> bool:
    if not is_json(answer):
        return False
    value = json.loads(answer)
    return keys is True or (isinstance(value, dict) and set(keys) <= set(value))  # type: ignore[arg-type]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# What may be expected, as a test and in words.
_TEXT = (_is_text, "a text")
_TEXTS = (_is_texts, "a list of texts")
_RANGE = (_is_range, "[least, most]")
_PATTERN = (_is_pattern, "a regular expression of Python")
_KEYS = (lambda value: value is True or _is_texts(value), "true, or the keys that the object needs")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
# What `evaluate` counts, what a prompt of `compare` may ask for, and what a reward can be made of.
RULES = Members(
    "rule",
    [
        AnswerRule("exact_match", lambda _, answer, text: is_exact_match(answer, text), *_TEXT),
        AnswerRule("token_f1", lambda _, answer, text: token_f1(answer, text), *_TEXT, is_graded=True),
        AnswerRule("rouge_l", lambda _, answer, text: rouge_l(answer, text), *_TEXT, is_graded=True),
        AnswerRule("contains", lambda _, answer, texts: any(has_words(answer, it) for it in texts), *_TEXTS),
        AnswerRule("contains_all", lambda _, answer, texts: all(has_words(answer, it) for it in texts), *_TEXTS),
        AnswerRule("excludes", lambda _, answer, texts: not any(has_words(answer, it) for it in texts), *_TEXTS),
        AnswerRule("regex", _has_match, *_PATTERN),
        AnswerRule("json", lambda _, answer, keys: _has_json(answer, keys), *_KEYS),
        AnswerRule("words", lambda _, answer, span: span[0] <= count_words(answer) <= span[1], *_RANGE),
        AnswerRule("lines", lambda _, answer, span: span[0] <= _count_lines(answer) <= span[1], *_RANGE),
        AnswerRule("refuses", lambda _, answer, wanted: is_refusal(answer) is wanted, *_FLAG),
    ],
)


def check_rules(rules: object, *, where: str) -> dict[str, Any]:
    """Return the rules of a prompt, once they are known to be rules that an answer keeps or breaks.

    Raises:
        DataError: they are not a mapping, one of them does not exist, or its value is not what it takes.
    """
    known = [name for name, rule in RULES.items() if not rule.is_graded]
    hint = f"rules: {', '.join(known)}"
    if not isinstance(rules, Mapping):
        raise DataError(f"{where}: rules is not a mapping", hint=f'for example {{"contains": ["Canberra"]}}; {hint}')
    for name, value in rules.items():
        if name not in known:
            raise DataError(f"{where}: there is no rule {name!r}{suggestion(str(name), known)}", hint=hint)
        if not RULES[name].accepts(value):
            raise DataError(f"{where}: the rule {name} has the value {value!r}", hint=f"it takes {RULES[name].takes}")
    return dict(rules)


def broken_rules(rules: Mapping[str, Any], *, prompt: str, answer: str) -> list[str]:
    """The names of the rules that an answer to a prompt breaks."""
    return [name for name, expected in rules.items() if not RULES[name].score(prompt, answer, expected)]
