"""Findings of an audit: what was found, how often, where, and the recipe line that would act on it."""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemma_tune.data.data_report import MAX_SAMPLES
from gemma_tune.data.encode.encode_rows import Side
from gemma_tune.data.text.duplicates import NEAR_THRESHOLD
from gemma_tune.data.text.pii import PII_KINDS
from gemma_tune.members import Members
from gemma_tune.text import counted

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One rendered row."""

    where: str  # its place, such as `rows.jsonl:12`
    side: Side
    response: str  # as rendered
    key: bytes  # 16 bytes; equal rows have equal keys
    texts: tuple[tuple[str, str], ...]  # name and text of the row's own values, before templating
    learned: tuple[bool, ...]  # of each of them, whether it is an answer or a part of one
    category: str | None
    num_tokens: int
    num_supervised: int  # tokens in the loss
    control_strings: int  # control tokens spelled out in the row's text


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


@dataclass(frozen=True, slots=True)
class FindingKind:
    """A kind of thing that an audit finds in rows."""

    name: str  # what `--fail-on KIND=N` names
    severity: Severity
    summary: str  # may hold `{count}`, such as `3 rows`, `{verb}` (have), `{be}` (are) and facts of the audit
    option: str | None = None

    def finding(
        self, count: int, samples: tuple[tuple[str, str], ...] = (), places: str = "", **facts: object
    ) -> AuditFinding:
        """The finding in `count` rows; `facts` are those that the summary and the option name."""
        verb, be = ("has", "is") if count == 1 else ("have", "are")
        summary = self.summary.format(count=counted(count, "row"), verb=verb, be=be, **facts)
        option = self.option and self.option.format(**facts)
        return AuditFinding(self.name, self.severity, count, summary, samples, places, option)


_NEAR, _EXACT = "data.clean.drop_duplicates=near", "data.clean.drop_duplicates=exact"
FINDING_KINDS = Members(
    "kind of finding",
    (
        FindingKind("leak_exact", "error", "{count} of the eval side {be} trained on: the score would measure memory"),
        FindingKind("leak_near", "error", "{count} of the eval side {be} nearly the same as a training row", _NEAR),
        FindingKind("duplicate_exact", "warning", "{count} {verb} occurred before, word for word", _EXACT),
        FindingKind(
            "duplicate_near",
            "warning",
            f"{{count}} {{be}} nearly the same as an earlier one (at least {NEAR_THRESHOLD:.0%} of the word 3-grams)",
            _NEAR,
        ),
        FindingKind("empty_answer", "warning", "{count} {verb} an empty answer and cannot be used"),
        FindingKind(
            "blank_answer",
            "warning",
            "{count} {verb} an answer of nothing but white space",
            "data.clean.min_response_words=1",
        ),
        FindingKind(
            "one_word_answer", "info", "{count} {verb} an answer of one word", "data.clean.min_response_words=2"
        ),
        FindingKind(
            "role_order", "warning", "{count} {verb} roles that the chat template does not take, and cannot be used"
        ),
        FindingKind("unusable", "warning", "{count} cannot be used"),
        FindingKind(
            "too_long",
            "warning",
            "{count} {be} longer than data.max_seq_tokens {limit:,}; data.too_long decides what happens",
            "data.max_seq_tokens={longest}",
        ),
        FindingKind(
            "control_tokens",
            "warning",
            "{count} {verb} control tokens such as <end_of_turn> spelled out; see data.control_tokens",
            "data.control_tokens=refuse",
        ),
        FindingKind(
            "encoding", "warning", "{count} {verb} text that was decoded wrongly", "data.clean.fix_encoding=true"
        ),
        FindingKind(
            "citation_marks", "info", "{count} {verb} citation marks such as [1]", "data.clean.strip_citations=true"
        ),
        *(
            FindingKind(
                f"shared_{side}_{end}",
                "warning",
                f"{{count}} {{verb}} {article} that {does} {{shared}}, {{share:.0%}} of all" + learned,
                f"data.clean.strip_{end}s=[{{shared}}]",
            )
            for side, article, learned in (("answer", "an answer", "; it is learned"), ("prompt", "a prompt", ""))
            for end, does in (("head", "begins with"), ("tail", "ends in"))
        ),
        FindingKind("languages", "info", "the rows are in {found} languages, guessed from {size:,} of them: {shares}"),
        *(
            FindingKind(
                f"pii_{kind.name}",
                "error" if kind.name == "secret" else "warning",
                f"{{count}} {{verb}} something that looks like {kind.title}",
                "data.clean.pii=mask",
            )
            for kind in PII_KINDS.values()
        ),
    ),
)


class Hits:
    """Rows with one kind of finding: how many, the first of them, and 8 bytes for the place of each."""

    def __init__(self) -> None:
        self.count = 0
        self._last: str | None = None
        self.samples: list[tuple[str, str]] = []
        self.places = Places()

    def add(self, where: str, detail: str) -> None:
        if where != self._last:
            self._last = where
            self.count += 1
            self.places.add(where)
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append((where, detail))


class Finds:
    """What an audit finds, while it is collected."""

    def __init__(self) -> None:
        self._hits: defaultdict[str, Hits] = defaultdict(Hits)

    def add(self, kind: str, where: str, detail: str) -> None:
        """Add a find of a kind; several of one row in a row count once."""
        self._hits[kind].add(where, detail)

    def findings(self, **facts: object) -> list[AuditFinding]:
        """Sum up each kind of which there is one; `facts` are those that the kinds' sentences name."""
        return [
            FINDING_KINDS[name].finding(hits.count, tuple(hits.samples), hits.places.compact(), **facts)
            for name, hits in self._hits.items()
        ]


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
