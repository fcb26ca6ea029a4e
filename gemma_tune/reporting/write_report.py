"""Write the report of one run, or of several side by side, as HTML and as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from gemma_tune.disk import GENERATED, write_generated
from gemma_tune.reporting.charts import NARROW, NUM_COLOURS, Chart, Line, place_curves
from gemma_tune.reporting.facts import (
    RunFacts,
    before_after,
    differing_settings,
    evaluations_side_by_side,
    gather_facts,
    questions_side_by_side,
    results_side_by_side,
)
from gemma_tune.reporting.markdown import MARKDOWN_FILTERS
from gemma_tune.reporting.pages import TEMPLATES_DIR, TEXT_FILTERS, write_page
from gemma_tune.runs.evaluation import METRICS
from gemma_tune.runs.layout import RunDir
from gemma_tune.templates import render_template

_CURVES = (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm"))


def write_report(run: RunDir) -> None:
    """Write report.html and report.md into a run."""
    write_reports([run], html=run.report_page, text=run.report_text)


def write_reports(runs: Sequence[RunDir], *, html: Path | None, text: Path | None) -> None:
    """Write the report of one run, or of several side by side, to the files that are named.

    Raises:
        RunError: a file of a run is damaged, or one cannot be written.
    """
    facts = [gather_facts(run) for run in runs]
    described = {
        "runs": facts,
        "metrics": METRICS,
        "compared": results_side_by_side(facts),
        "settings": differing_settings(facts),
    }
    if html is not None:
        write_page(
            html,
            "report",
            title=facts[0].name if len(facts) == 1 else f"{len(facts)} runs side by side",
            num_colours=NUM_COLOURS,
            before_after=before_after,
            loss_chart=_loss_chart(facts),
            curves=[(title, chart) for name, title in _CURVES if (chart := _curve(facts, name, title))],
            evaluations=evaluations_side_by_side(facts),
            questions=questions_side_by_side(facts),
            **described,
        )
    if text is not None:
        filters = {**MARKDOWN_FILTERS, **TEXT_FILTERS}
        written = render_template(TEMPLATES_DIR / "report.md.j2", described, filters=filters)
        write_generated(text, f"{written.rstrip()}\n\n[//]: # ({GENERATED})\n")


def _loss_chart(runs: Sequence[RunFacts]) -> Chart | None:
    lines = []
    for index, run in enumerate(runs):
        if len(runs) == 1:
            lines.append(Line(run.points("loss"), 0, "faint"))
        lines.append(Line(run.smooth_loss, index % NUM_COLOURS))
    # A single run has a colour to spare for what it was not trained on.
    first = 1 if len(runs) == 1 else 0
    lines += [Line(run.eval_losses, (index + first) % NUM_COLOURS, "points") for index, run in enumerate(runs)]
    return place_curves(lines, title="loss by step", x_label="step", height=300)


def _curve(runs: Sequence[RunFacts], name: str, title: str) -> Chart | None:
    lines = [Line(run.points(name), index % NUM_COLOURS) for index, run in enumerate(runs)]
    return place_curves(lines, title=f"{title} by step", x_label="step", width=NARROW, height=230)
