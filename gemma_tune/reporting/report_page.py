"""The report of one run, or of several side by side, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.reporting.charts import NARROW, NUM_COLOURS, Line, bar_chart, line_chart, share_bar
from gemma_tune.reporting.facts import (
    RunFacts,
    before_after,
    data_facts,
    differing_settings,
    lock_facts,
    plan_against_measured,
    reproduce_steps,
    results,
    results_side_by_side,
    warnings,
)
from gemma_tune.reporting.page import write_page
from gemma_tune.runs.evaluation import METRICS, Estimate, Figure, Group, format_estimate

_CURVES = (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm"))
_STATUS_TAGS = {"finished": "good", "running": "info", "stopped": "warning", "failed": "error"}
# What is drawn of each category.
_CATEGORY_METRIC = "exact_match"


def write_report_page(path: Path, runs: Sequence[RunFacts]) -> None:
    """Write the report of `runs` to `path`."""
    is_one = len(runs) == 1
    write_page(
        path,
        title=runs[0].name if is_one else f"{len(runs)} runs side by side",
        body=_BODY,
        style=_STYLE,
        values={
            "runs": [_run_values(run, colour=index % NUM_COLOURS) for index, run in enumerate(runs)],
            "is_one": is_one,
            "loss_chart": _loss_chart(runs),
            "curves": [(title, chart) for name, title in _CURVES if (chart := _curve(runs, name=name, title=title))],
            "compared": [] if is_one else results_side_by_side(runs),
            "settings": [] if is_one else differing_settings(runs),
            "evaluations": [] if is_one else _evaluations(runs),
            "questions": _questions(runs),
        },
    )


def _run_values(run: RunFacts, *, colour: int) -> dict[str, Any]:
    evaluation = run.evaluation
    return {
        "name": run.name,
        "colour": colour,
        "headline": run.headline,
        "manifest": run.manifest,
        "status_tag": _STATUS_TAGS[run.manifest.status],
        "cards": _cards(run),
        "warnings": warnings(run),
        "evaluation": evaluation,
        "figures": _figure_rows(evaluation.rows[0]) if evaluation else [],
        "categories": _category_rows(evaluation.rows[1:]) if evaluation else [],
        "general": _figure_rows(evaluation.general[0]) if evaluation else [],
        "data": run.data,
        "data_facts": data_facts(run.data) if run.data else [],
        "lengths": bar_chart(run.data.get("length_bins", ()), limit=run.data["max_seq_tokens"]) if run.data else "",
        "plan": plan_against_measured(run),
        "lock": lock_facts(run.lock) if run.lock else [],
        "overrides": run.lock["overrides"] if run.lock else [],
        "packages": [(name, version) for name, version in run.lock["packages"].items() if version] if run.lock else [],
        "recipe": run.recipe,
        "steps": reproduce_steps(run),
    }


def _cards(run: RunFacts) -> list[tuple[str, str, bool]]:
    """The figures that matter most, what came out (on a wide card), then what it took: value, label, is wide."""
    summary = run.summary
    if summary is None:
        return []
    shown = dict(results(run))
    cards = []
    if summary.exact_match_after is not None:
        matched = before_after(summary.exact_match_before, summary.exact_match_after, form=".1%")
        cards.append((matched, f"exact match on {summary.exact_match_rows:,} held-out rows", True))
    if summary.eval_loss_after is not None:
        loss = before_after(summary.eval_loss_before, summary.eval_loss_after, form=".3f")
        cards.append((loss, "eval loss on held-out rows, nats a token", True))
    return [
        *cards,
        (f"{summary.train_rows:,}", "training rows", False),
        (f"{summary.steps:,}", "steps", False),
        (shown["time of training"].partition(" of ")[0], f"of training, at {shown['speed']}", False),
        (shown["peak memory"], "peak memory", False),
    ]


# --- curves -----------------------------------------------------------------------------------------------------------


def _loss_chart(runs: Sequence[RunFacts]) -> Any:
    lines = []
    for index, run in enumerate(runs):
        colour = index % NUM_COLOURS
        if len(runs) == 1:
            lines.append(Line(run.points("loss"), colour, "faint"))
        lines.append(Line(run.smooth_loss, colour))
    for index, run in enumerate(runs):
        # A single run has a colour to spare for what it was not trained on.
        colour = 1 if len(runs) == 1 else index % NUM_COLOURS
        lines.append(Line(run.eval_losses, colour, "points"))
    return line_chart(lines, title="loss by step", x_label="step", height=300)


def _curve(runs: Sequence[RunFacts], *, name: str, title: str) -> Any:
    lines = [Line(run.points(name), index % NUM_COLOURS) for index, run in enumerate(runs)]
    return line_chart(lines, title=f"{title} by step", x_label="step", width=NARROW, height=230)


# --- tables -----------------------------------------------------------------------------------------------------------


def _shown(estimate: Estimate | None, *, metric: str, signed: bool = False) -> tuple[str, str]:
    """Value and interval."""
    value, bracket, interval = format_estimate(estimate, metric=metric, signed=signed).partition("[")
    return value.strip(), bracket + interval


def _figure_rows(group: Group) -> list[dict[str, Any]]:
    return [{"label": METRICS[figure.metric].label, **_figure_cells(figure)} for figure in group.figures]


def _figure_cells(figure: Figure) -> dict[str, Any]:
    return {
        "base": _shown(figure.base, metric=figure.metric),
        "tuned": _shown(figure.tuned, metric=figure.metric),
        "difference": _shown(figure.difference, metric=figure.metric, signed=True),
        "verdict": figure.verdict or "",
    }


def _category_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        figure = group.figure(_CATEGORY_METRIC)
        if figure is None:
            continue
        estimates = [(estimate, colour) for estimate, colour in ((figure.base, 1), (figure.tuned, 0)) if estimate]
        bar = share_bar([(each.value, each.low, each.high, colour) for each, colour in estimates])
        rows.append({"name": group.category, "rows": group.rows, "bar": bar, **_figure_cells(figure)})
    return rows


def _evaluations(runs: Sequence[RunFacts]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The tuned models' figures on all rows, a column a run."""
    groups = [run.evaluation.rows[0] if run.evaluation else None for run in runs]
    rows = []
    for metric, described in METRICS.items():
        figures = [group.figure(metric) if group else None for group in groups]
        if any(figures):
            rows.append((described.label, [_shown(each.tuned if each else None, metric=metric) for each in figures]))
    return rows


def _questions(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Every question with the base's answer and that of each run that was asked it."""
    asked: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for question in run.summary.questions if run.summary else ():
            shown = asked.setdefault(
                (question.question, question.expected),
                {"question": question.question, "expected": question.expected, "answers": []},
            )
            if not shown["answers"]:
                shown["answers"].append(
                    ("before", question.before, question.before.split() == question.expected.split())
                )
            label = "after" if len(runs) == 1 else run.name
            shown["answers"].append((label, question.after, question.after.split() == question.expected.split()))
    return list(asked.values())


_STYLE = """
.lead { margin-top: 2px; color: var(--soft); overflow-wrap: anywhere; }
.facts { grid-template-columns: repeat(4, 1fr); } .facts .wide { grid-column: span 2; }
.facts .card b { font-size: 20px; } .facts .wide b { font-size: 28px; white-space: nowrap; }
.warn { border-left: 4px solid var(--warning); }
.warn ul { margin: 4px 0 0; padding-left: 20px; } .warn li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.card > table:first-child, .scroll > table:first-child { margin-top: 0; }
.card > table:first-child tr:first-child > *, .scroll > table tr:first-child > * { border-top: 0; }
th { font-size: 13px; font-weight: 600; color: var(--soft); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
td:last-child, th:last-child { padding-right: 0; }
td b, td.number { white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: 12px; white-space: nowrap; }
td.label { color: var(--soft); min-width: 120px; } .named td.label { width: 30%; }
.better b { color: var(--good); } .worse b { color: var(--error); }
.bar-cell { width: 34%; min-width: 72px; vertical-align: middle; } td.name { overflow-wrap: break-word; }
svg.shares { height: 24px; } svg .track { fill: var(--code); } svg .whisker { fill: var(--ink); }
svg .fill0 { fill: var(--c0); } svg .fill1 { fill: var(--c1); }
svg polyline {
  fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke;
}
svg polyline.faint { stroke-width: 1; opacity: .4; } svg polyline.points { stroke-width: 1.5; stroke-dasharray: 2 5; }
svg polyline.c0 { stroke: var(--c0); } svg circle.c0 { fill: var(--c0); } .key.c0 { background: var(--c0); }
svg polyline.c1 { stroke: var(--c1); } svg circle.c1 { fill: var(--c1); } .key.c1 { background: var(--c1); }
svg polyline.c2 { stroke: var(--c2); } svg circle.c2 { fill: var(--c2); } .key.c2 { background: var(--c2); }
svg polyline.c3 { stroke: var(--c3); } svg circle.c3 { fill: var(--c3); } .key.c3 { background: var(--c3); }
svg polyline.c4 { stroke: var(--c4); } svg circle.c4 { fill: var(--c4); } .key.c4 { background: var(--c4); }
svg polyline.c5 { stroke: var(--c5); } svg circle.c5 { fill: var(--c5); } .key.c5 { background: var(--c5); }
svg circle { stroke: var(--card); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin-bottom: 8px; }
.key { display: inline-block; width: 12px; height: 4px; border-radius: 2px; margin-right: 6px; vertical-align: 3px; }
.key.dot { width: 8px; height: 8px; border-radius: 50%; vertical-align: 0; } .key.thin { opacity: .4; }
.qa { margin-bottom: 10px; } .qa h3 { font-size: 15px; margin: 0 0 8px; overflow-wrap: anywhere; }
.qa h3, .qa dd { white-space: pre-wrap; }
.qa dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 4px 14px; }
.qa dt { color: var(--soft); font-size: 13px; padding-top: 1px; max-width: 180px; overflow-wrap: anywhere; }
.qa dd { margin: 0; overflow-wrap: anywhere; }
.qa dd.right { color: var(--good); } .qa dd.wrong { color: var(--error); } .qa dd i { color: var(--soft); }
pre { border-radius: 8px; padding: 12px 14px; margin: 8px 0 0; white-space: pre-wrap; line-height: 1.45; }
.mono { font: 13px ui-monospace, Menlo, Consolas, monospace; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; }
.pair h3, .card h3 { font-size: 14px; margin: 0 0 8px; }
details.run { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 16px;
  margin-bottom: 10px; font-size: 15px; }
details.run > summary { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
details.run .card { border: 0; padding: 0; background: none; } details.run h2 { margin-top: 20px; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); }
@media (max-width: 640px) {
  .roomy { display: none; } .scroll td, .scroll th { padding-right: 8px; font-size: 14px; }
  .scroll td.mono, .scroll td.value { overflow-wrap: break-word; font-size: 13px; }
  .scroll td small { white-space: normal; font-size: 11px; }
  td.label, td.name { min-width: 84px; overflow-wrap: anywhere; }
  svg.w420 text { font-size: 13px; }
  .pair { grid-template-columns: 1fr; }
  .qa dl { grid-template-columns: 1fr; gap: 0; } .qa dt { margin-top: 6px; max-width: none; }
  .named, .named tbody, .named tr, .named td { display: block; width: auto; }
  .named td.label { width: auto; padding-bottom: 0; } .named td + td { border-top: 0; padding-top: 0; }
  .named tr:first-child td + td { padding-top: 0; }
  .facts { grid-template-columns: 1fr 1fr; } .facts .card b { font-size: 18px; } .facts .wide b { font-size: 24px; }
}
"""

_BODY = """
{% macro cell(shown, class="") -%}
<td class="{{ class }}"><b>{{ shown[0] }}</b>{% if shown[1] %}<small>{{ shown[1] }}</small>{% endif %}</td>
{%- endmacro %}
{% macro named(rows) %}
<table class="named">
{% for label, value in rows %}
<tr><td class="label">{{ label }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
{% macro figures(rows) %}
<div class="scroll"><table>
<tr><th></th><th>base</th><th>tuned</th><th>difference</th></tr>
{% for row in rows %}
<tr><td class="label">{{ row.label }}</td>{{ cell(row.base) }}{{ cell(row.tuned) }}
{{ cell(row.difference, row.verdict) }}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro evaluation(run) %}
<h2>Evaluation <small>{{ run.evaluation.rows[0].rows | counted("row") }} of {{ run.evaluation.rows_label }}</small></h2>
<div class="card">
{{ figures(run.figures) }}
<p class="soft note">Small: 95 % intervals, from resampled rows (Wilson's for the shares of one model). Differences are
tuned − base on the same rows, in points for percentages; a coloured one has its whole interval on one side of 0.</p>
</div>
{% if run.categories %}
<h2>Exact match by category</h2>
<div class="card">
<div class="legend"><span><span class="key c1"></span>base</span><span><span class="key c0"></span>tuned</span></div>
<div class="scroll"><table>
<tr><th>category</th><th></th><th>base</th><th>tuned</th><th class="roomy">difference</th></tr>
{% for row in run.categories %}
<tr><td class="name">{{ row.name }}<small>{{ row.rows | counted("row") }}</small></td>
<td class="bar-cell">{{ row.bar }}</td>
{{ cell(row.base) }}{{ cell(row.tuned) }}{{ cell(row.difference, "roomy " ~ row.verdict) }}</tr>
{% endfor %}
</table></div></div>
{% endif %}
<h2>Forgetting
<small>{{ run.evaluation.general[0].rows | counted("text") }}: {{ run.evaluation.general_label }}</small></h2>
<div class="card">
{{ figures(run.general) }}
<p class="soft note">A higher loss says that such text got less likely. These few short texts say nothing of knowledge,
reasoning or safety.</p>
</div>
{% endmacro %}
{% macro data(run) %}
<h2>Data</h2>
<div class="card">
<div class="scroll"><table>
<tr><th>source</th><th>template</th><th class="number">read</th><th class="number">trained</th></tr>
{% for source in run.data.sources %}
<tr><td>{{ source.label }}</td><td>{{ source.template }}{{ " (detected)" if source.detected else "" }}</td>
<td class="number">{{ source.rows_read | thousands }}</td>
<td class="number">{{ source.train_rows | thousands }}{% if source.repeats %}<small>{{ source.repeats | thousands }}
repeats</small>{% endif %}</td></tr>
{% endfor %}
{% if run.data.eval_label %}
<tr><td>{{ run.data.eval_label }}</td><td></td><td></td><td class="number">held out</td></tr>
{% endif %}
</table></div>
{{ named(run.data_facts) }}
</div>
{% if run.lengths %}
<h2>Length in tokens <small>of all rows, before the limit</small></h2>
<div class="card">{{ run.lengths }}</div>
{% endif %}
{% endmacro %}
{% macro plan(run) %}
<h2>Planned and measured</h2>
<div class="card"><div class="scroll"><table>
<tr><th></th><th>planned</th><th>measured</th></tr>
{% for what, planned, measured in run.plan %}
<tr><td class="label">{{ what }}</td><td>{{ planned }}</td><td>{{ measured }}</td></tr>
{% endfor %}
</table></div></div>
{% endmacro %}
{% macro origin(run) %}
{% if run.lock %}
<h2>What it depends on</h2>
<div class="card">
{{ named(run.lock) }}
<details><summary>versions</summary>
{{ named(run.packages) }}
</details>
</div>
{% endif %}
<h2>Make it again</h2>
<div class="card">
<pre>{{ run.steps | join("\n") }}</pre>
{% if run.overrides %}
<p class="soft note">Overrides of the recipe, contained in resolved.yaml:
{% for override in run.overrides %}<code>{{ override }}</code> {% endfor %}</p>
{% endif %}
{% if run.recipe %}
<details><summary>resolved.yaml, every setting with its value</summary><pre>{{ run.recipe }}</pre></details>
{% endif %}
</div>
{% endmacro %}
{% macro warned(run) %}
{% if run.warnings %}
<div class="card warn note"><b>{{ "Worth knowing" if is_one else run.name }}</b>
<ul>
{% for line in run.warnings %}
<li>{{ line }}</li>
{% endfor %}
</ul></div>
{% endif %}
{% endmacro %}

<h1>{{ title }}</h1>
{% if is_one %}
{% set run = runs[0] %}
<div class="head"><p class="lead">{{ run.headline }}</p>
<span class="tag {{ run.status_tag }}">{{ run.manifest.status }}</span>
<span class="soft note">{{ run.manifest.started[:16] | replace("T", " ") }} UTC</span></div>
{% if run.cards %}
<div class="facts">
{% for value, label, is_wide in run.cards %}
<div class="card{{ " wide" if is_wide else "" }}"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}
</div>
{% endif %}
{{ warned(run) }}
{% else %}
<div class="card note"><div class="scroll"><table>
<tr><th></th>{% for run in runs %}<th><span class="key c{{ run.colour }}"></span>{{ run.name }}</th>{% endfor %}</tr>
{% for label, values in compared %}
<tr><td class="label">{{ label }}</td>{% for value in values %}<td class="value">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table></div></div>
{% for run in runs %}
{{ warned(run) }}
{% endfor %}
<h2>Settings that differ</h2>
<div class="card"><div class="scroll">
{% if settings %}
<table>
<tr><th></th>{% for run in runs %}<th><span class="key c{{ run.colour }}"></span>{{ run.name }}</th>{% endfor %}</tr>
{% for name, values in settings %}
<tr><td class="mono">{{ name }}</td>{% for value in values %}<td class="mono">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% else %}
None: all runs have the same recipe.
{% endif %}
</div></div>
{% endif %}

{% if loss_chart %}
<h2>Loss <small>nats a supervised token</small></h2>
<div class="card">
<div class="legend">
{% if is_one %}
<span><span class="key c0"></span>training, smoothed</span><span><span class="key c0 thin"></span>training</span>
<span><span class="key dot c1"></span>held-out rows</span>
{% else %}
{% for run in runs %}
<span><span class="key c{{ run.colour }}"></span>{{ run.name }}</span>
{% endfor %}
<span>lines: training, smoothed; dots: held-out rows</span>
{% endif %}
</div>
{{ loss_chart }}
</div>
{% endif %}
{% if curves %}
<div class="pair note">
{% for heading, chart in curves %}
<div class="card"><h3>{{ heading }}</h3>{{ chart }}</div>
{% endfor %}
</div>
{% endif %}

{% if is_one %}
{% if runs[0].evaluation %}
{{ evaluation(runs[0]) }}
{% endif %}
{% elif evaluations %}
<h2>Evaluation <small>of the tuned models; each on its own rows</small></h2>
<div class="card"><div class="scroll"><table>
<tr><th></th>{% for run in runs %}<th><span class="key c{{ run.colour }}"></span>{{ run.name }}</th>{% endfor %}</tr>
{% for label, values in evaluations %}
<tr><td class="label">{{ label }}</td>{% for value in values %}{{ cell(value) }}{% endfor %}</tr>
{% endfor %}
</table></div></div>
{% endif %}

{% if questions %}
<h2>Answers <small>to held-out rows, greedy</small></h2>
{% for asked in questions %}
<div class="card qa"><h3>{{ asked.question }}</h3>
<dl>
{% for label, text, is_right in asked.answers %}
<dt>{{ label }}</dt><dd class="{{ "right" if is_right else "wrong" }}">
{%- if text %}{{ text }}{% else %}<i>(nothing)</i>{% endif %}</dd>
{% endfor %}
<dt>expected</dt><dd>{{ asked.expected }}</dd>
</dl></div>
{% endfor %}
{% endif %}

{% if is_one %}
{% if runs[0].data %}
{{ data(runs[0]) }}
{% endif %}
{% if runs[0].plan %}
{{ plan(runs[0]) }}
{% endif %}
{{ origin(runs[0]) }}
{% else %}
<h2>Each run</h2>
{% for run in runs %}
<details class="run"><summary><span class="key c{{ run.colour }}"></span>{{ run.name }}</summary>
<p class="lead">{{ run.headline }}</p>
{% if run.evaluation %}
{{ evaluation(run) }}
{% endif %}
{% if run.data %}
{{ data(run) }}
{% endif %}
{% if run.plan %}
{{ plan(run) }}
{% endif %}
{{ origin(run) }}
</details>
{% endfor %}
{% endif %}
<footer>Made by gemma-tune from the files of the run. This page holds no script and loads nothing.</footer>
"""
