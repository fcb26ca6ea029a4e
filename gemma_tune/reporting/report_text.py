"""The report of one run, or of several side by side, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_tune.reporting.facts import (
    RunFacts,
    data_facts,
    differing_settings,
    lock_facts,
    plan_against_measured,
    reproduce_steps,
    results,
    results_side_by_side,
    warnings,
)
from gemma_tune.reporting.markdown import escaped, fenced, table
from gemma_tune.runs.evaluation import METRICS, Group, format_estimate


def build_report_text(runs: Sequence[RunFacts]) -> str:
    """The report as CommonMark with tables."""
    lines: list[str] = []
    if len(runs) > 1:
        header = ("", *(escaped(run.name) for run in runs))
        lines += [f"# {len(runs)} runs side by side", ""]
        lines += table(header, [(label, *values) for label, values in results_side_by_side(runs)])
        lines += ["", "## Settings that differ", ""]
        settings = differing_settings(runs)
        lines += table(header, [(name, *values) for name, values in settings]) if settings else ["None."]
        lines.append("")
    for run in runs:
        lines += _of_run(run)
    return "\n".join(lines).rstrip() + "\n"


def _of_run(run: RunFacts) -> list[str]:
    lines = [f"# {escaped(run.name)}", "", escaped(run.headline), "", *table(("", ""), results(run)), ""]
    if found := warnings(run):
        lines += ["## Worth knowing", "", *(f"- {escaped(line)}" for line in found), ""]
    evaluation = run.evaluation
    if evaluation is not None:
        everything, *categories = evaluation.rows
        lines += [f"## Evaluation: {everything.rows:,} rows of {escaped(evaluation.rows_label)}", ""]
        lines += [*_figures(everything), ""]
        if categories:
            lines += ["### Exact match by category", "", *_categories(categories), ""]
        general = evaluation.general[0]
        lines += [f"### Forgetting: {general.rows:,} texts, {escaped(evaluation.general_label)}", ""]
        lines += [*_figures(general), ""]
        lines += ["In brackets: 95 % intervals. Differences are tuned − base, in points for percentages.", ""]
    if run.summary is not None and run.summary.questions:
        lines += ["## Answers", ""]
        for question in run.summary.questions:
            answers = [("before", question.before), ("after", question.after), ("expected", question.expected)]
            lines += [f"**{escaped(question.question)}**", "", *table(("", ""), answers), ""]
    if run.data is not None:
        sources = [
            (source["label"], source["template"], f"{source['rows_read']:,}", f"{source['train_rows']:,}")
            for source in run.data["sources"]
        ]
        lines += ["## Data", "", *table(("source", "template", "read", "trained"), sources), ""]
        lines += [*table(("", ""), data_facts(run.data)), ""]
    if planned := plan_against_measured(run):
        lines += ["## Planned and measured", "", *table(("", "planned", "measured"), planned), ""]
    if run.lock is not None:
        lines += ["## What it depends on", "", *table(("", ""), lock_facts(run.lock)), ""]
    return [*lines, "## Make it again", "", *fenced("\n".join(reproduce_steps(run)), "sh"), ""]


def _figures(group: Group) -> list[str]:
    rows = [
        (
            METRICS[figure.metric].label,
            format_estimate(figure.base, metric=figure.metric),
            format_estimate(figure.tuned, metric=figure.metric),
            format_estimate(figure.difference, metric=figure.metric, signed=True),
        )
        for figure in group.figures
    ]
    return table(("", "base", "tuned", "difference"), rows)


def _categories(groups: Sequence[Group]) -> list[str]:
    rows = []
    for group in groups:
        figure = group.figure("exact_match")
        base, tuned = (figure.base, figure.tuned) if figure else (None, None)
        estimates = [format_estimate(each, metric="exact_match") for each in (base, tuned)]
        rows.append((group.category or "", f"{group.rows:,}", *estimates))
    return table(("category", "rows", "base", "tuned"), rows)
