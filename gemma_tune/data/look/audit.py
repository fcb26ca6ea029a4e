"""The audit of fine-tuning rows: counts, lengths, languages and findings, with 0.2 kB of memory a row."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gemma_tune.data.data_report import LengthBin
from gemma_tune.data.encode.arrays import length_bins, percentile
from gemma_tune.data.look.common_ends import CommonEnds
from gemma_tune.data.look.faults import PROGRESS_ROWS, Progress, find_faults, find_unusable
from gemma_tune.data.look.findings import FINDING_KINDS, SEVERITIES, AuditFinding, AuditRow, Finds
from gemma_tune.data.look.repeats import find_repeats
from gemma_tune.data.text.duplicates import NearDuplicates
from gemma_tune.data.text.shared_ends import SAMPLE_TEXTS

# Languages are guessed on so many rows, evenly spaced, from the first characters of each.
LANGUAGE_ROWS = 400
_LANGUAGE_CHARS = 400
# Shorter texts are mostly guessed wrong.
_LANGUAGE_MIN_WORDS = 8
_LANGUAGE_MIN_CONFIDENCE = 0.5
# Below this share of the guessed rows a second language is a misguess more often than a language.
_LANGUAGE_MIN_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class AuditReport:
    """All that an audit found; `dataclasses.asdict` of it is JSON."""

    rows: int  # that could be read and rendered
    train_rows: int
    eval_rows: int
    bad_rows: int  # that could not
    tokens: int
    supervised_tokens: int
    supervised_share: float  # of the tokens, 0 to 1
    max_seq_tokens: int
    length_bins: tuple[LengthBin, ...]  # rows by length in tokens
    length_p50: int  # tokens
    length_p90: int
    length_p99: int
    length_max: int
    categories: tuple[tuple[str, int], ...]  # name and rows, most frequent first; empty where rows have none
    languages: tuple[tuple[str, int], ...]  # ISO 639-1 code (`?`: too short or unclear) and rows of the sample
    language_rows: int  # size of that sample
    findings: tuple[AuditFinding, ...]  # errors first, then by count
    notes: tuple[str, ...] = ()  # what rows hold and the template does not read, one sentence each


def audit_rows(
    rows: Sequence[AuditRow],
    *,
    bad: Sequence[tuple[str, str]],
    max_seq_tokens: int,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Look at every row.

    Args:
        rows: read several times; those on disk need not fit into memory.
        bad: place and problem of the rows that could not be read or rendered.
        on_progress: is told what is being done, how much of it is done, and how much there is.
    """
    tell = on_progress or (lambda what, done, total: None)
    is_eval = np.zeros(len(rows), dtype=np.bool_)
    tokens, supervised = np.zeros((2, len(rows)), dtype=np.int64)
    keys = bytearray()
    categories: Counter[str] = Counter()
    near = NearDuplicates(len(rows), read=lambda index: [text for _, text in rows[index].texts])
    for index, row in enumerate(rows):
        is_eval[index] = row.side == "eval"
        tokens[index], supervised[index] = row.num_tokens, row.num_supervised
        keys += row.key
        categories.update([row.category] if row.category else [])
        near.add(text for _, text in row.texts)
        if (index + 1) % PROGRESS_ROWS == 0 or index + 1 == len(rows):
            tell("rows compared", index + 1, len(rows))
    found = Finds()
    find_repeats(rows, near, found, keys=keys, is_eval=is_eval)
    find_unusable(bad, found)
    ends = CommonEnds(_evenly(rows, SAMPLE_TEXTS))
    cited_answers = find_faults(rows, found, ends=ends, max_seq_tokens=max_seq_tokens, tell=tell)
    findings = found.findings(limit=max_seq_tokens, longest=percentile(tokens, 100))
    findings = [_weigh_citations(finding, cited_answers) for finding in findings]
    languages, language_rows = _language_mix(rows)
    findings += _language_findings(languages, language_rows) + ends.findings(len(rows))
    num_tokens, num_supervised = int(tokens.sum()), int(supervised.sum())
    return AuditReport(
        rows=len(rows),
        train_rows=int((~is_eval).sum()),
        eval_rows=int(is_eval.sum()),
        bad_rows=len(bad),
        tokens=num_tokens,
        supervised_tokens=num_supervised,
        supervised_share=num_supervised / num_tokens if num_tokens else 0.0,
        max_seq_tokens=max_seq_tokens,
        length_bins=length_bins(tokens),
        length_p50=percentile(tokens, 50),
        length_p90=percentile(tokens, 90),
        length_p99=percentile(tokens, 99),
        length_max=percentile(tokens, 100),
        categories=tuple(categories.most_common()),
        languages=languages,
        language_rows=language_rows,
        findings=tuple(sorted(findings, key=_rank)),
    )


def _rank(found: AuditFinding) -> tuple[int, int, str]:
    return SEVERITIES.index(found.severity), -found.count, found.kind


def _weigh_citations(finding: AuditFinding, cited_answers: int) -> AuditFinding:
    """Citation marks are learned where they stand in an answer."""
    if finding.kind != "citation_marks" or not cited_answers:
        return finding
    summary = f"{finding.summary}, {cited_answers:,} of them in an answer"
    return replace(finding, severity="warning", summary=summary)


def _language_mix(rows: Sequence[AuditRow]) -> tuple[tuple[tuple[str, int], ...], int]:
    """Language code and rows of an evenly spaced sample, most frequent first, and the size of the sample."""
    if not rows:
        return (), 0
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=_LANGUAGE_MIN_CONFIDENCE
    )
    sample = Counter(_language(row, identifier) for row in _evenly(rows, LANGUAGE_ROWS))
    return tuple(sample.most_common()), sample.total()


def _evenly(rows: Sequence[AuditRow], most: int) -> Iterator[AuditRow]:
    size = min(most, len(rows))
    return (rows[index * len(rows) // size] for index in range(size))


def _language(row: AuditRow, identifier: object) -> str:
    text = " ".join(text for _, text in row.texts)[:_LANGUAGE_CHARS]
    # A language without blanks has long words.
    if len(text.split()) < _LANGUAGE_MIN_WORDS and text.isascii():
        return "?"
    code: str = identifier.classify(text)[0]  # type: ignore[attr-defined]
    # `und` is unsure, `zxx` no language, such as a list of figures.
    return "?" if code in ("und", "zxx") else code


def _language_findings(languages: Sequence[tuple[str, int]], size: int) -> list[AuditFinding]:
    known = [(code, count) for code, count in languages if code != "?" and count >= max(2, _LANGUAGE_MIN_SHARE * size)]
    if len(known) < 2:
        return []
    shares = ", ".join(f"{code} {count / size:.0%}" for code, count in known)
    count = sum(count for _, count in known[1:])
    return [FINDING_KINDS["languages"].finding(count, found=len(known), size=size, shares=shares)]
