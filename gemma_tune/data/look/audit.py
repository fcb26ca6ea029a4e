"""The audit of fine-tuning rows: counts, lengths, languages and findings, with 0.2 kB of memory a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from gemma_tune.data.data_report import LengthBin
from gemma_tune.data.encode.lengths import length_bins, percentile
from gemma_tune.data.look.audit_row import AuditRow
from gemma_tune.data.look.faults import PROGRESS_ROWS, Progress, find_faults, find_unusable
from gemma_tune.data.look.findings import SEVERITIES, AuditFinding
from gemma_tune.data.look.languages import language_findings, language_mix
from gemma_tune.data.look.repeats import find_repeats
from gemma_tune.data.text.duplicates import NearDuplicates


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
    languages, language_rows = language_mix(rows)
    findings = chain(
        find_repeats(rows, near, keys=keys, is_eval=is_eval),
        find_unusable(bad),
        find_faults(rows, max_seq_tokens=max_seq_tokens, tell=tell),
        language_findings(languages, language_rows),
    )
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
