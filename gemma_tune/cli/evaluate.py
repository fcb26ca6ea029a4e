"""`gemma-tune evaluate`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from gemma_tune.cli.arguments import AsJson, RunPath
from gemma_tune.runs.evaluation import METRICS, Evaluation, Figure, Group, format_estimate, read_evaluation
from gemma_tune.runs.layout import RunDir, open_run
from gemma_tune.terminal import Terminal, TerminalReporter

_STYLES = {"better": "green", "worse": "red", None: ""}
# What is shown of each category; --json has all of it.
_CATEGORY_METRIC = "exact_match"
_NOTE = (
    "In brackets: 95 % intervals, from resampled rows (Wilson's for the shares of one model); one without width means "
    "that all rows agree. Differences are tuned − base on the same rows, in points for percentages; a coloured one has "
    "its whole interval on one side of 0. The forgetting check reads a few short texts: a higher loss there says that "
    "such text got less likely, and nothing of knowledge, reasoning or safety."
)


def evaluate(
    run: RunPath,
    rows: Annotated[int | None, typer.Option(min=1, help="The first N rows; all of them unless given.")] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Rows of this file (.jsonl, .json, .csv, .parquet…) instead of those that the run held out."),
    ] = None,
    what: Annotated[str, typer.Option(help="Which models, separated by commas.")] = "base,tuned",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; the recipe's unless given.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows per forward pass; the recipe's unless given.")
    ] = None,
    expect_json: Annotated[bool, typer.Option("--expect-json", help="Count answers that are valid JSON.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what is stored in the run already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure base and tuned model on the same rows: loss, exact match, F1, ROUGE-L, format, and what was forgotten.

    Every figure has its 95 % interval. The figures stay in the run and are measured again only when something changed.
    """
    from gemma_tune.evaluation.evaluate import EvaluateSettings, evaluate_run, parse_sides
    from gemma_tune.machine.quiet import libraries_to

    terminal = Terminal()
    opened = open_run(run)
    settings = EvaluateSettings(
        sides=parse_sides(what),
        source=source,
        num_rows=rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        expects_json=expect_json,
    )
    with libraries_to(opened.library_log), TerminalReporter(terminal) as reporter:
        evaluation, is_new = evaluate_run(opened, settings=settings, reporter=reporter, again=again)
    if as_json:
        terminal.json(asdict(evaluation))
        return
    if not is_new:
        terminal.note(f"measured {evaluation.made}, and nothing has changed since; --again measures again")
    print_evaluation(terminal, opened, evaluation)


def print_evaluation(terminal: Terminal, run: RunDir, evaluation: Evaluation) -> None:
    """The figures as tables: all rows, the categories, the forgetting check."""
    everything, *categories = evaluation.rows
    _print_figures(terminal, everything, heading=f"{everything.rows:,} rows of {evaluation.rows_label}")
    if categories:
        heading = f"{METRICS[_CATEGORY_METRIC].label} by category"
        _print_groups(terminal, categories, metric=_CATEGORY_METRIC, heading=heading, label="category")
    general, *kinds = evaluation.general
    _print_figures(terminal, general, heading=f"Forgetting: {general.rows:,} texts ({evaluation.general_label})")
    if kinds:
        _print_groups(terminal, kinds, metric="loss", heading="", label="loss by kind")
    terminal.result(Text(f"\n{_NOTE}", style="dim"))
    terminal.plain(f"row by row: {run.evaluated_rows}")


def print_stored_evaluation(terminal: Terminal, run: RunDir) -> None:
    """The figures that a run keeps, if it was evaluated."""
    evaluation = read_evaluation(run)
    if evaluation is not None:
        print_evaluation(terminal, run, evaluation)


def _print_figures(terminal: Terminal, group: Group, *, heading: str) -> None:
    rows = [(METRICS[figure.metric].label, *_cells(figure, metric=figure.metric)) for figure in group.figures]
    terminal.table(("", "base", "tuned", "difference"), rows, heading=heading)


def _print_groups(terminal: Terminal, groups: Sequence[Group], *, metric: str, heading: str, label: str) -> None:
    rows = []
    for group in groups:
        figure = group.figure(metric)
        cells = _cells(figure, metric=metric) if figure else ("—", "—", "—")
        rows.append((group.category, f"{group.rows:,}", *cells))
    terminal.table((label, "rows", "base", "tuned", "difference"), rows, heading=heading, right=(1,))


def _cells(figure: Figure, *, metric: str) -> tuple[str, str, Text]:
    difference = format_estimate(figure.difference, metric=metric, signed=True)
    return (
        format_estimate(figure.base, metric=metric),
        format_estimate(figure.tuned, metric=metric),
        Text(difference, style=_STYLES[figure.verdict]),
    )
