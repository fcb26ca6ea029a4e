"""What is wrong, doubtful or private in rows, one by one.

No value of a personal find leaves this module: samples carry its first character and its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from gemma_tune.data.look.audit_row import AuditRow
from gemma_tune.data.look.findings import AuditFinding, Hits
from gemma_tune.data.text.damage import citation_marks, encoding_damage
from gemma_tune.data.text.pii import PII_KINDS, PII_NAMES, PiiKind, find_pii, mask_pii, masked_value
from gemma_tune.text import counted, shorten

PROGRESS_ROWS = 500
_DETAIL_CHARS = 160
_ARTICLES = {kind: "an" if kind in ("email", "iban") else "a" for kind in PII_KINDS}

Progress = Callable[[str, int, int], None]

_EMPTY_ANSWER = re.compile(r"(?:response|answer) is empty")
_ROLE_ORDER = re.compile(
    r"the last message is from|no messages|unknown (?:role|from)|chat template refuses|[Cc]onversation roles|alternate"
)


def find_unusable(bad: Iterable[tuple[str, str]]) -> list[AuditFinding]:
    """Sort the problems of rows that cannot be used (place and problem) by their kind."""
    empty, roles, others = Hits(), Hits(), Hits()
    for where, problem in bad:
        hits = empty if _EMPTY_ANSWER.search(problem) else roles if _ROLE_ORDER.search(problem) else others
        # A problem may quote the row.
        detail = mask_pii(problem)
        hits.add(where, shorten(detail, num_chars=_DETAIL_CHARS))
    return [
        *empty.finding("empty_answer", "warning", "{count} {verb} an empty answer and cannot be used"),
        *roles.finding(
            "role_order", "warning", "{count} {verb} roles that the chat template does not take, and cannot be used"
        ),
        *others.finding("unusable", "warning", "{count} cannot be used"),
    ]


def find_faults(rows: Sequence[AuditRow], *, max_seq_tokens: int, tell: Progress) -> list[AuditFinding]:
    """Look at the length, the answer and the texts of every row."""
    long, empty, one_word, control, damaged, cited = (Hits() for _ in range(6))
    personal: dict[PiiKind, Hits] = {kind: Hits() for kind in PII_KINDS}
    longest = cited_answers = 0
    for number, row in enumerate(rows, start=1):
        longest = max(longest, row.num_tokens)
        if row.num_tokens > max_seq_tokens:
            long.add(row.where, f"{row.num_tokens:,} tokens")
        # Two words are enough to know.
        words = row.response.split(maxsplit=2)
        if not words:
            empty.add(row.where, "no answer")
        elif len(words) == 1:
            one_word.add(row.where, f"{len(words[0])} characters")
        if row.control_strings:
            control.add(row.where, counted(row.control_strings, "control token"))
        for name, text in row.texts:
            for match in find_pii(text):
                value = masked_value(text[match.start : match.end])
                personal[match.kind].add(row.where, f"{name}: {PII_NAMES[match.kind]} {value}")
            damage = encoding_damage(text)
            if damage is not None:
                damaged.add(row.where, f"{name}: {damage!r}")
            marks = citation_marks(text)
            if marks:
                cited_answers += text.strip() in row.response
                start, end = marks[0]
                more = f" and {len(marks) - 1:,} more" if len(marks) > 1 else ""
                cited.add(row.where, f"{name}: {text[start:end]}{more}")
        if number % PROGRESS_ROWS == 0 or number == len(rows):
            tell("rows searched", number, len(rows))
    in_answers = f", {cited_answers:,} of them in an answer" if cited_answers else ""
    findings = [
        *long.finding(
            "too_long",
            "warning",
            f"{{count}} {{be}} longer than data.max_seq_tokens {max_seq_tokens:,}; data.too_long decides what happens",
            option=f"data.max_seq_tokens={longest}",
        ),
        *empty.finding(
            "blank_answer",
            "warning",
            "{count} {verb} an answer of nothing but white space",
            option="data.clean.min_response_words=1",
        ),
        *one_word.finding(
            "one_word_answer", "info", "{count} {verb} an answer of one word", option="data.clean.min_response_words=2"
        ),
        *control.finding(
            "control_tokens",
            "warning",
            "{count} {verb} control tokens such as <end_of_turn> spelled out; see data.control_tokens",
            option="data.control_tokens=refuse",
        ),
        *damaged.finding(
            "encoding",
            "warning",
            "{count} {verb} text that was decoded wrongly",
            option="data.clean.fix_encoding=true",
        ),
        *cited.finding(
            "citation_marks",
            "warning" if cited_answers else "info",
            "{count} {verb} citation marks such as [1]" + in_answers,
            option="data.clean.strip_citations=true",
        ),
    ]
    for kind in PII_KINDS:
        findings += personal[kind].finding(
            f"pii_{kind}",
            "error" if kind == "secret" else "warning",
            f"{{count}} {{verb}} something that looks like {_ARTICLES[kind]} {PII_NAMES[kind]}",
            option="data.clean.pii=mask",
        )
    return findings
