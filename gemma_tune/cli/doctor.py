"""`gemma-tune doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gemma_tune.cli.arguments import AsJson, Overrides
from gemma_tune.terminal import Terminal, TerminalReporter, make_table

if TYPE_CHECKING:
    from gemma_tune.doctor.finding import Finding

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="Also check that its model and rows are available, and that it fits."),
    ] = None,
    overrides: Overrides = None,
    report: Annotated[bool, typer.Option("--report", help="Print a block to paste into a bug report.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="The longest that one library may take to import; 90 by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at this machine: is everything there that a run needs, and does it work? Exit code 1 if not."""
    from gemma_tune.doctor.examine import PROBE_SECONDS, examine
    from gemma_tune.doctor.finding import worst
    from gemma_tune.doctor.report import bug_report
    from gemma_tune.recipe.load import load_recipe

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ()).recipe if recipe else None
    with TerminalReporter(terminal) as reporter:
        findings = examine(
            loaded,
            output_dir="runs",
            seconds=seconds or PROBE_SECONDS,
            progress=lambda name, done, total: reporter.progress(f"probes ({name})", done, total),
        )
    verdict = worst(findings)
    if as_json:
        terminal.json(
            {"verdict": verdict, "findings": [asdict(finding) for finding in findings], "report": bug_report(findings)}
        )
    elif report:
        terminal.plain(bug_report(findings))
    else:
        terminal.result(_table(findings))
        terminal.result(_closing(findings))
    if verdict == "fail":
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    """A row a finding, and below it what to do."""
    rows = []
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        found = Text(finding.found)
        if finding.fix:
            found.append(f"\n→ {finding.fix}", style="cyan")
        rows.append((Text(f"{mark} {finding.verdict}", style=style), Text(finding.name, style="bold"), found))
    return make_table(("", "", ""), rows, whole=(0, 1))


def _closing(findings: Sequence[Finding]) -> Text:
    counts = {verdict: sum(item.verdict == verdict for item in findings) for verdict in _MARKS}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if counts["fail"]:
        advice = "a run would not work; fix what failed"
    elif counts["warn"]:
        advice = "runs work, within what the warnings say"
    else:
        advice = "everything is as it should be"
    return Text(f"\n{counted}: {advice}. For a bug report: gemma-tune doctor --report", style="bold")
