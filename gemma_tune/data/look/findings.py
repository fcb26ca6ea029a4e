"""Findings of an audit: what was found, how often, where, and the recipe line that would act on it."""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemma_tune.data.data_report import MAX_SAMPLES
from gemma_tune.data.text.pii import PII_KINDS
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


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """One kind of thing that was found."""

    kind: str  # a short name, for `--fail-on KIND=N`
    severity: Severity
    count: int  # rows (or problems) concerned
    summary: str  # a sentence
    samples: tuple[tuple[str, str], ...]  # place and detail of the first 20; personal values are masked
    places: str  # every place, compactly: `rows.jsonl: 3-5, 9`
    option: str | None = None  # the recipe line that would act on it, where there is one


class Hits:
    """Rows of one kind while they are collected: how many, the first of them, and 8 bytes for the place of each."""

    def __init__(self) -> None:
        self._count = 0
        self._last: str | None = None
        self._samples: list[tuple[str, str]] = []
        self._places = Places()

    def add(self, where: str, detail: str) -> None:
        """Add a find; several of one row in a row count once."""
        if where != self._last:
            self._last = where
            self._count += 1
            self._places.add(where)
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append((where, detail))

    def finding(self, kind: str, severity: Severity, summary: str, *, option: str | None = None) -> list[AuditFinding]:
        """Sum up, as a list of one or none; `summary` may hold `{count}`, such as `3 rows`, `{verb}` and `{be}`."""
        if not self._count:
            return []
        verb, be = ("has", "is") if self._count == 1 else ("have", "are")
        text = summary.format(count=counted(self._count, "row"), verb=verb, be=be)
        return [AuditFinding(kind, severity, self._count, text, tuple(self._samples), self._places.compact(), option)]


# `rows.jsonl:12`, `owner/name[train]:3`, `rows.parquet[3]`.
_PLACE = re.compile(r"(?P<source>.+?)(?::(?P<line>[0-9]+)|\[(?P<index>[0-9]+)\])", re.DOTALL)


class Places:
    """Places such as `rows.jsonl:3`, collected as line numbers by source."""

    def __init__(self) -> None:
        self._numbers: dict[str, array[int]] = {}

    def add(self, place: str) -> None:
        """Add a place; one of another form stays as it is."""
        match = _PLACE.fullmatch(place)
        found = self._numbers.setdefault(match["source"] if match else place, array("q"))
        if match:
            found.append(int(match["line"] or match["index"]))

    def compact(self) -> str:
        """Write them as `rows.jsonl: 3-5, 9; more.jsonl: 1`."""
        sources = self._numbers.items()
        return "; ".join(f"{source}: {_ranges(found)}" if found else source for source, found in sources)


def _ranges(numbers: array[int]) -> str:
    ordered = np.unique(np.array(numbers, dtype=np.int64))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
