"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]
_ORDER: tuple[Verdict, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One row of the table: what was looked at, what is there, and what to do, if anything.

    `warn`: it works, with a limit that one should know; `fail`: a run would end with an error."""

    name: str
    verdict: Verdict
    found: str
    fix: str | None = None


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict of all findings together; ok of none."""
    return max((finding.verdict for finding in findings), key=_ORDER.index, default="ok")
