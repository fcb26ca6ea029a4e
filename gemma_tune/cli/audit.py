"""What `gemma-tune data audit` prints, and the limit at which it fails."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from gemma_tune.errors import DataError
from gemma_tune.terminal import Terminal
from gemma_tune.text import listed, suggestion
from gemma_tune.yaml_io import dump_yaml

if TYPE_CHECKING:
    from gemma_tune.data.look.audit import AuditReport

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_BAR_CHARS = 40
_SHOWN_SAMPLES = 3
_SHOWN_NAMES = 8


def print_audit(terminal: Terminal, report: AuditReport) -> None:
    """The report on stdout: counts, lengths, findings with their first places, the worst first."""
    terminal.plain(
        f"{report.train_rows:,} training rows, {report.eval_rows:,} eval rows, {report.bad_rows:,} not usable\n"
        f"{report.tokens:,} tokens, {report.supervised_share:.1%} of them in the loss"
    )
    for name, entries in (("categories", report.categories), ("languages", report.languages)):
        if entries:
            note = f" (of {report.language_rows:,} sampled rows)" if name == "languages" else ""
            shown = listed([f"{key} {count:,}" for key, count in entries], shown=_SHOWN_NAMES)
            terminal.plain(f"{name}{note}: {shown}")
    if report.length_bins:
        terminal.plain("")
        _print_lengths(terminal, report)
    for note in report.notes:
        terminal.plain(note)
    terminal.plain("")
    if not report.findings:
        terminal.plain("nothing was found")
        return
    rows = [
        (Text(each.severity, style=_STYLES[each.severity]), f"{each.count:,}", each.kind, each.option or None)
        for each in report.findings
    ]
    terminal.table(("", "rows", "kind", "recipe line that would act"), rows, right=(1,))
    for found in report.findings:
        terminal.plain("")
        terminal.result(Text.assemble((found.severity, _STYLES[found.severity]), f": {found.summary}"))
        for where, detail in found.samples[:_SHOWN_SAMPLES]:
            terminal.plain(f"  {_one_line(where)}: {_one_line(detail)}")
        if len(found.samples) > _SHOWN_SAMPLES:
            terminal.plain("  …")
    strips: defaultdict[str, list[str]] = defaultdict(list)
    for found in report.findings:
        key, _, strings = (found.option or "").partition("=")
        if key.startswith("data.clean.strip_") and strings.startswith("["):
            strips[key.rpartition(".")[2]] += json.loads(strings)
    if strips:
        terminal.plain("\nTo strip what rows share, paste into the recipe those that are not meant:")
        terminal.plain(dump_yaml({"data": {"clean": dict(strips)}}))


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where `--fail-on` draws the line: any finding of `severities`, or `count` rows with findings of `kind`."""

    severities: tuple[str, ...] = ()
    kind: str | None = None
    count: int = 1


def parse_threshold(text: str) -> Threshold:
    """`error` (any error), `warning` (any warning or error) or `KIND=N` (N or more rows with that finding).

    Raises:
        DataError: the text is none of these.
    """
    from gemma_tune.data.look.findings import FINDING_KINDS

    if text == "error":
        return Threshold(severities=("error",))
    if text == "warning":
        return Threshold(severities=("error", "warning"))
    kind, _, limit = text.partition("=")
    if kind in FINDING_KINDS and limit.isascii() and limit.isdigit() and int(limit) > 0:
        return Threshold(kind=kind, count=int(limit))
    near = suggestion(kind, FINDING_KINDS) if kind not in FINDING_KINDS else ""
    raise DataError(
        f"--fail-on {text!r} is not known{near}",
        hint=f"give error, warning, or KIND=N, N at least 1, with a KIND of: {', '.join(FINDING_KINDS)}",
    )


def threshold_passed(report: AuditReport, threshold: Threshold) -> bool:
    """Whether the findings reach the threshold, so that the command fails."""
    if threshold.kind is None:
        return any(found.severity in threshold.severities for found in report.findings)
    return sum(found.count for found in report.findings if found.kind == threshold.kind) >= threshold.count


def _print_lengths(terminal: Terminal, report: AuditReport) -> None:
    highest = max(one.count for one in report.length_bins)
    rows = []
    for one in report.length_bins:
        bar = "█" * max(1, round(_BAR_CHARS * one.count / highest)) if one.count else ""
        over = "  over data.max_seq_tokens" if one.low > report.max_seq_tokens and one.count else ""
        rows.append((f"{one.low:,}–{one.high:,}", f"{one.count:,}", bar + over))
    terminal.table(("tokens", "rows", ""), rows, right=(0, 1))
    terminal.plain(
        f"p50 {report.length_p50:,} · p90 {report.length_p90:,} · p99 {report.length_p99:,} · "
        f"longest {report.length_max:,} · data.max_seq_tokens {report.max_seq_tokens:,}"
    )


def _one_line(text: str) -> str:
    """Nothing of a row's text may move the cursor."""
    return "".join(char if char.isprintable() else " " for char in text)
