"""What is wrong, doubtful or private in rows, one by one.

No value of a personal find leaves this module: samples carry its first character and its length.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from gemma_tune.data.look.common_ends import CommonEnds
from gemma_tune.data.look.findings import AuditRow, Finds
from gemma_tune.data.text.damage import citation_marks, encoding_damage
from gemma_tune.data.text.pii import PII_KINDS, find_pii, mask_pii, masked_value
from gemma_tune.text import counted, shorten

PROGRESS_ROWS = 500
_DETAIL_CHARS = 160

Progress = Callable[[str, int, int], None]

_EMPTY_ANSWER = re.compile(r"(?:response|answer) is empty")
_ROLE_ORDER = re.compile(
    r"the last message is from|no messages|unknown (?:role|from)|chat template refuses|[Cc]onversation roles|alternate"
)


def find_unusable(bad: Iterable[tuple[str, str]], found: Finds) -> None:
    """Sort the problems of rows that cannot be used (place and problem) by their kind."""
    for where, problem in bad:
        is_empty, is_order = _EMPTY_ANSWER.search(problem), _ROLE_ORDER.search(problem)
        kind = "empty_answer" if is_empty else "role_order" if is_order else "unusable"
        # A problem may quote the row.
        found.add(kind, where, shorten(mask_pii(problem), num_chars=_DETAIL_CHARS))


def find_faults(
    rows: Sequence[AuditRow], found: Finds, *, ends: CommonEnds, max_seq_tokens: int, tell: Progress
) -> int:
    """Look at the length, the answer and the texts of every row; returns how many answers hold citation marks."""
    cited_answers = 0
    for number, row in enumerate(rows, start=1):
        if row.num_tokens > max_seq_tokens:
            found.add("too_long", row.where, f"{row.num_tokens:,} tokens")
        # Two words are enough to know.
        words = row.response.split(maxsplit=2)
        if not words:
            found.add("blank_answer", row.where, "no answer")
        elif len(words) == 1:
            found.add("one_word_answer", row.where, f"{len(words[0])} characters")
        if row.control_strings:
            found.add("control_tokens", row.where, counted(row.control_strings, "control token"))
        ends.count(row)
        for (name, text), is_learned in zip(row.texts, row.learned, strict=True):
            for match in find_pii(text):
                _, _, title = PII_KINDS[match.kind].title.partition(" ")
                value = masked_value(text[match.start : match.end])
                found.add(f"pii_{match.kind}", row.where, f"{name}: {title} {value}")
            damage = encoding_damage(text)
            if damage is not None:
                found.add("encoding", row.where, f"{name}: {damage!r}")
            marks = citation_marks(text)
            if marks:
                cited_answers += is_learned
                start, end = marks[0]
                more = f" and {len(marks) - 1:,} more" if len(marks) > 1 else ""
                found.add("citation_marks", row.where, f"{name}: {text[start:end]}{more}")
        if number % PROGRESS_ROWS == 0 or number == len(rows):
            tell("rows searched", number, len(rows))
    return cited_answers
