"""Figures over one answer, in plain Python."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether two texts are equal apart from white space at their ends and its amount inside."""
    return answer.split() == expected.split()


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over words as a bag, 0 to 1 (SQuAD, arXiv:1606.05250, section 6.1).

    Words as in SQuAD's own script: lower case, without ASCII punctuation and English articles, split at white space.
    Two texts of which one has no word left count 1 where both have none, else 0.
    """
    answered, wanted = _squad_words(answer), _squad_words(expected)
    if not answered or not wanted:
        return float(answered == wanted)
    return _f1((Counter(answered) & Counter(wanted)).total(), len(answered), len(wanted))


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1 (ROUGE-L; Lin, 2004, section 3, with beta 1).

    A word is a run of letters and digits of any script, in lower case, not stemmed. On English that is what the package
    `rouge-score` computes, which drops every letter that is not ASCII and brings NLTK along.
    """
    answered, wanted = _WORD.findall(answer.lower()), _WORD.findall(expected.lower())
    if not answered or not wanted:
        return 0.0
    return _f1(_common_subsequence_length(answered, wanted), len(answered), len(wanted))


def is_json(answer: str) -> bool:
    """Whether the whole answer is one JSON value; NaN and Infinity, which Python reads, are none (RFC 8259)."""
    try:
        json.loads(answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def count_words(text: str) -> int:
    """Pieces between white space."""
    return len(text.split())


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _squad_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(num_common: int, num_answered: int, num_wanted: int) -> float:
    # 2PR / (P + R) with P = common / answered and R = common / wanted.
    return 2 * num_common / (num_answered + num_wanted)


def _common_subsequence_length(first: Sequence[str], second: Sequence[str]) -> int:
    """By dynamic programming, a row of the table at a time."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for at, other in enumerate(second, start=1):
            above = lengths[at]
            lengths[at] = diagonal + 1 if word == other else max(above, lengths[at - 1])
            diagonal = above
    return lengths[-1]
