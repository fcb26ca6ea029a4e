"""What is wrong, doubtful or private in fine-tuning rows: counts, findings with places, and the option that would act.

No value of a personal find leaves this module: samples carry its first character and its length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gemma_tune.data.data_report import LengthBin, length_bins
from gemma_tune.data.text.damage import citation_marks, encoding_damage
from gemma_tune.data.text.duplicates import NEAR_THRESHOLD, Fingerprints, exact_groups
from gemma_tune.data.text.pii import PII_KINDS, PII_NAMES, PiiKind, find_pii, mask_pii, masked_value
from gemma_tune.text import counted

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
# What `--fail-on KIND=N` may name.
FINDING_KINDS: tuple[str, ...] = (
    "leak_exact",
    "leak_near",
    "duplicate_exact",
    "duplicate_near",
    "empty_answer",
    "blank_answer",
    "one_word_answer",
    "role_order",
    "unusable",
    "too_long",
    "control_tokens",
    "encoding",
    "citation_marks",
    "languages",
    *(f"pii_{kind}" for kind in PII_KINDS),
)
MAX_SAMPLES = 20
# Languages are guessed on so many rows, evenly spaced, from the first characters of each.
LANGUAGE_ROWS = 400
_LANGUAGE_CHARS = 400
# Shorter texts are mostly guessed wrong.
_LANGUAGE_MIN_WORDS = 8
_LANGUAGE_MIN_CONFIDENCE = 0.5
# Below this share of the guessed rows a second language is a misguess more often than a language.
_LANGUAGE_MIN_SHARE = 0.03
_PROGRESS_ROWS = 500
_DETAIL_CHARS = 160

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One rendered row.

    Attributes:
        where: its place, such as `rows.jsonl:12`.
        side: whether it is trained on or evaluated.
        prompt, response: as rendered.
        key: equal rows have equal keys.
        texts: name and text of the row's own values, before templating.
        category: the row's category, where it has one.
        num_tokens, num_supervised: tokens in all and in the loss.
        control_strings: control tokens spelled out in the row's text.
    """

    where: str
    side: Literal["train", "eval"]
    prompt: str
    response: str
    key: bytes
    texts: tuple[tuple[str, str], ...]
    category: str | None
    num_tokens: int
    num_supervised: int
    control_strings: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: a short name, for `--fail-on KIND=N`.
        severity: error, warning or info.
        count: rows (or problems) concerned.
        summary: a sentence.
        samples: place and detail of the first 20; personal values are masked.
        places: every place, compactly: `rows.jsonl: 3-5, 9`.
        option: the recipe line that would act on it, where there is one.
    """

    kind: str
    severity: Severity
    count: int
    summary: str
    samples: tuple[tuple[str, str], ...]
    places: str
    option: str | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """All that an audit found; `dataclasses.asdict` of it is JSON.

    Attributes:
        rows, train_rows, eval_rows: that could be read and rendered.
        bad_rows: that could not.
        tokens, supervised_tokens: over all rows.
        supervised_share: of the tokens, 0 to 1.
        max_seq_tokens: the recipe's limit.
        length_bins: rows by length in tokens.
        length_p50, length_p90, length_p99, length_max: tokens.
        categories: name and rows, most frequent first; empty where rows have none.
        languages: ISO 639-1 code and rows of the sample, most frequent first; `?` is too short or unclear.
        language_rows: size of that sample.
        findings: errors first, then by count.
    """

    rows: int
    train_rows: int
    eval_rows: int
    bad_rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    max_seq_tokens: int
    length_bins: tuple[LengthBin, ...]
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    categories: tuple[tuple[str, int], ...]
    languages: tuple[tuple[str, int], ...]
    language_rows: int
    findings: tuple[Finding, ...]


def audit_rows(
    rows: Sequence[AuditRow],
    *,
    bad: Sequence[tuple[str, str]],
    max_seq_tokens: int,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Look at every row. `bad` holds place and problem of the rows that could not be read or rendered.

    `on_progress` is told what is being done, how much of it is done, and how much there is.
    """
    tell = on_progress or (lambda what, done, total: None)
    lengths = sorted(row.num_tokens for row in rows)
    tokens, supervised = sum(lengths), sum(row.num_supervised for row in rows)
    languages, language_rows = _language_mix(rows)
    findings = [
        *_duplicate_findings(rows, tell=tell),
        *_bad_findings(bad),
        *_length_findings(rows, max_seq_tokens=max_seq_tokens),
        *_answer_findings(rows),
        *_text_findings(rows, tell=tell),
        *_language_findings(languages, language_rows),
    ]
    return AuditReport(
        rows=len(rows),
        train_rows=sum(row.side == "train" for row in rows),
        eval_rows=sum(row.side == "eval" for row in rows),
        bad_rows=len(bad),
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_share=supervised / tokens if tokens else 0.0,
        max_seq_tokens=max_seq_tokens,
        length_bins=length_bins(lengths),
        length_p50=_percentile(lengths, 50),
        length_p90=_percentile(lengths, 90),
        length_p99=_percentile(lengths, 99),
        length_max=_percentile(lengths, 100),
        categories=tuple(Counter(row.category for row in rows if row.category).most_common()),
        languages=languages,
        language_rows=language_rows,
        findings=tuple(sorted(findings, key=_rank)),
    )


def _rank(found: Finding) -> tuple[int, int, str]:
    return SEVERITIES.index(found.severity), -found.count, found.kind


# --- findings ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Hits:
    """Places of one kind while they are collected; `where` may come several times and counts once."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, where: str, detail: str) -> None:
        self.found.setdefault(where, []).append(detail)

    def finding(self, kind: str, severity: Severity, summary: str, *, option: str | None = None) -> list[Finding]:
        """`summary` may hold `{count}`, such as `3 rows`, and `{verb}`, have or has."""
        if not self.found:
            return []
        count = len(self.found)
        samples = [(where, detail) for where, details in self.found.items() for detail in details]
        text = summary.format(
            count=_rows(count), verb="has" if count == 1 else "have", be="is" if count == 1 else "are"
        )
        return [Finding(kind, severity, count, text, tuple(samples[:MAX_SAMPLES]), compact_places(self.found), option)]


def _duplicate_findings(rows: Sequence[AuditRow], *, tell: Progress) -> list[Finding]:
    exact, near, leaked, near_leaked = _Hits(), _Hits(), _Hits(), _Hits()
    first_of: dict[bytes, dict[str, int]] = {}
    for index, row in enumerate(rows):
        first_of.setdefault(row.key, {}).setdefault(row.side, index)
    for side in ("train", "eval"):
        indices = [index for index, row in enumerate(rows) if row.side == side]
        for group in exact_groups([rows[index].key for index in indices]):
            for member in group[1:]:
                exact.add(rows[indices[member]].where, f"the same as {rows[indices[group[0]]].where}")
    for row in rows:
        if row.side == "eval" and "train" in first_of[row.key]:
            leaked.add(row.where, f"the same as {rows[first_of[row.key]['train']].where} of the training rows")

    # Each distinct row once; exact duplicates and exact leaks have been told above.
    distinct = {side: [sides[side] for sides in first_of.values() if side in sides] for side in ("train", "eval")}
    prints = Fingerprints(
        [[text for _, text in row.texts] for row in rows],
        on_progress=lambda done, total: tell("rows compared", done, total),
    )
    for side in ("train", "eval"):
        for group in prints.groups(distinct[side]):
            for member in group[1:]:
                near.add(rows[member].where, f"nearly the same as {rows[group[0]].where}")
    asked = [index for index in distinct["eval"] if "train" not in first_of[rows[index].key]]
    for index, other in prints.pairs(asked, distinct["train"]):
        near_leaked.add(rows[index].where, f"nearly the same as {rows[other].where} of the training rows")
    return [
        *leaked.finding(
            "leak_exact", "error", "{count} of the eval side {be} trained on: the score would measure memory"
        ),
        *near_leaked.finding(
            "leak_near",
            "error",
            "{count} of the eval side {be} nearly the same as a training row",
            option="data.clean.drop_duplicates=near",
        ),
        *exact.finding(
            "duplicate_exact",
            "warning",
            "{count} {verb} occurred before, word for word",
            option="data.clean.drop_duplicates=exact",
        ),
        *near.finding(
            "duplicate_near",
            "warning",
            f"{{count}} {{be}} nearly the same as an earlier one (at least {NEAR_THRESHOLD:.0%} of the word 3-grams)",
            option="data.clean.drop_duplicates=near",
        ),
    ]


_EMPTY_ANSWER = re.compile(r"(?:response|answer) is empty")
_ROLE_ORDER = re.compile(
    r"the last message is from|no messages|unknown (?:role|from)|chat template refuses|[Cc]onversation roles|alternate"
)


def _bad_findings(bad: Sequence[tuple[str, str]]) -> list[Finding]:
    empty, roles, others = _Hits(), _Hits(), _Hits()
    for where, problem in bad:
        hits = empty if _EMPTY_ANSWER.search(problem) else roles if _ROLE_ORDER.search(problem) else others
        # A problem may quote the row.
        hits.add(where, _shortened(mask_pii(problem)))
    return [
        *empty.finding("empty_answer", "warning", "{count} {verb} an empty answer and cannot be used"),
        *roles.finding(
            "role_order", "warning", "{count} {verb} roles that the chat template does not take, and cannot be used"
        ),
        *others.finding("unusable", "warning", "{count} cannot be used"),
    ]


def _length_findings(rows: Sequence[AuditRow], *, max_seq_tokens: int) -> list[Finding]:
    long = _Hits()
    for row in rows:
        if row.num_tokens > max_seq_tokens:
            long.add(row.where, f"{row.num_tokens:,} tokens")
    longest = max((row.num_tokens for row in rows), default=0)
    return long.finding(
        "too_long",
        "warning",
        f"{{count}} {{be}} longer than data.max_seq_tokens {max_seq_tokens:,}; data.too_long decides what happens",
        option=f"data.max_seq_tokens={longest}",
    )


def _answer_findings(rows: Sequence[AuditRow]) -> list[Finding]:
    empty, one_word = _Hits(), _Hits()
    for row in rows:
        # Two words are enough to know.
        words = row.response.split(maxsplit=2)
        if not words:
            empty.add(row.where, "no answer")
        elif len(words) == 1:
            one_word.add(row.where, f"{len(words[0])} characters")
    return [
        *empty.finding(
            "blank_answer",
            "warning",
            "{count} {verb} an answer of nothing but white space",
            option="data.clean.min_response_words=1",
        ),
        *one_word.finding(
            "one_word_answer", "info", "{count} {verb} an answer of one word", option="data.clean.min_response_words=2"
        ),
    ]


def _text_findings(rows: Sequence[AuditRow], *, tell: Progress) -> list[Finding]:
    control, damaged, cited = _Hits(), _Hits(), _Hits()
    personal: dict[PiiKind, _Hits] = {kind: _Hits() for kind in PII_KINDS}
    cited_answers = 0
    for number, row in enumerate(rows, start=1):
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
        if number % _PROGRESS_ROWS == 0 or number == len(rows):
            tell("rows searched", number, len(rows))
    in_answers = f", {cited_answers:,} of them in an answer" if cited_answers else ""
    findings = [
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


_ARTICLES = {kind: "an" if kind in ("email", "iban") else "a" for kind in PII_KINDS}


# --- languages --------------------------------------------------------------------------------------------------------


def _language_mix(rows: Sequence[AuditRow]) -> tuple[tuple[tuple[str, int], ...], int]:
    """Language code and rows of an evenly spaced sample, most frequent first, and the size of the sample."""
    if not rows:
        return (), 0
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=_LANGUAGE_MIN_CONFIDENCE
    )
    size = min(LANGUAGE_ROWS, len(rows))
    sample = [rows[index * len(rows) // size] for index in range(size)]
    return tuple(Counter(_language(row, identifier) for row in sample).most_common()), size


def _language(row: AuditRow, identifier: object) -> str:
    text = " ".join(text for _, text in row.texts)[:_LANGUAGE_CHARS]
    # A language without blanks has long words.
    if len(text.split()) < _LANGUAGE_MIN_WORDS and text.isascii():
        return "?"
    code: str = identifier.classify(text)[0]  # type: ignore[attr-defined]
    # `und` is unsure, `zxx` no language, such as a list of figures.
    return "?" if code in ("und", "zxx") else code


def _language_findings(languages: Sequence[tuple[str, int]], size: int) -> list[Finding]:
    known = [(code, count) for code, count in languages if code != "?" and count >= max(2, _LANGUAGE_MIN_SHARE * size)]
    if len(known) < 2:
        return []
    shares = ", ".join(f"{code} {count / size:.0%}" for code, count in known)
    return [
        Finding(
            "languages",
            "info",
            sum(count for _, count in known[1:]),
            f"the rows are in {len(known)} languages, guessed from {size:,} of them: {shares}",
            (),
            "",
        )
    ]


# --- lengths and places -----------------------------------------------------------------------------------------------


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that at least `percent` % of the values do not exceed; 0 of nothing."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0


# `rows.jsonl:12`, `owner/name[train]:3`, `rows.parquet[3]`.
_PLACE = re.compile(r"(?P<source>.+?)(?::(?P<line>[0-9]+)|\[(?P<index>[0-9]+)\])", re.DOTALL)


def compact_places(places: Iterable[str]) -> str:
    """`rows.jsonl: 3-5, 9; more.jsonl: 1` for places such as `rows.jsonl:3`; a place of another form stays as it is."""
    numbers: dict[str, list[int]] = {}
    for place in places:
        match = _PLACE.fullmatch(place)
        found = numbers.setdefault(match["source"] if match else place, [])
        if match:
            found.append(int(match["line"] or match["index"]))
    return "; ".join(f"{source}: {_ranges(found)}" if found else source for source, found in numbers.items())


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _shortened(text: str) -> str:
    return text if len(text) <= _DETAIL_CHARS else text[: _DETAIL_CHARS - 1] + "…"
