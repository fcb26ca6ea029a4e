"""The report of runs: gathers what they left and writes it as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma_tune.reporting.facts import gather_facts
from gemma_tune.reporting.report_page import write_report_page
from gemma_tune.reporting.report_text import build_report_text
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import cannot_write, write_text

HTML_FILE, TEXT_FILE = "report.html", "report.md"


def write_report(run: RunDir) -> None:
    """Write report.html and report.md into a run."""
    write_reports([run], html=run.path / HTML_FILE, text=run.path / TEXT_FILE)


def write_reports(runs: Sequence[RunDir], *, html: Path | None, text: Path | None) -> None:
    """Write the report of one run, or of several side by side, to the files that are named.

    Raises:
        RunError: a file of a run is damaged, or one cannot be written.
    """
    facts = [gather_facts(run) for run in runs]
    if html is not None:
        try:
            write_report_page(html, facts)
        except OSError as error:
            raise cannot_write(html, error) from None
    if text is not None:
        write_text(text, build_report_text(facts))
