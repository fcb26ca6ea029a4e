"""A comparison of models as one HTML file: who wins, and every prompt with its answers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.reporting.page import write_page


def write_compare_page(path: Path, comparison: Mapping[str, Any]) -> None:
    """Write `comparison`, a Comparison as a mapping, to `path`."""
    labels = comparison["labels"]
    write_page(
        path,
        title=" against ".join(labels) if len(labels) == 2 else ", ".join(labels),
        body=_BODY,
        style=_STYLE,
        values={
            "found": comparison,
            "groups": list(dict.fromkeys(pair["group"] for pair in comparison["pairs"] if pair["group"] is not None)),
            "several": len(labels) > 2,
        },
    )


_STYLE = """
.question { margin-bottom: 14px; } .question > p { margin-top: 8px; font-weight: 600; white-space: pre-wrap; }
.question > p, .answer p { overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; margin-top: 10px; }
.answer { border-left: 3px solid var(--line); padding: 2px 0 2px 12px; min-width: 0; }
.answer .body { white-space: pre-wrap; max-height: 420px; overflow: auto; margin-top: 4px; }
.answer.a0 { border-color: var(--c0); } .answer.a1 { border-color: var(--c1); } .answer.a2 { border-color: var(--c2); }
.answer.a3 { border-color: var(--c3); } .answer.a4 { border-color: var(--c4); } .answer.a5 { border-color: var(--c5); }
.label { font-size: 13px; font-weight: 600; color: var(--soft); overflow-wrap: anywhere; }
.verdicts { margin-top: 10px; } .verdicts .tag { white-space: normal; }
.wide { overflow-x: auto; } .wide td, .wide th { overflow-wrap: normal; }
.wide .number { white-space: nowrap; padding-left: 18px; }
.interval { white-space: nowrap; color: var(--soft); }
@media (max-width: 640px) {
  .wide .number { white-space: normal; padding-left: 8px; }
  .wide td:first-child, .wide th.name { overflow-wrap: anywhere; min-width: 84px; }
}
h3 { font-size: 14px; margin: 14px 0 0; }
pre { white-space: pre-wrap; padding: 12px; border-radius: 8px; }
"""

_BODY = """
{% macro share(estimate) %}
{% if estimate is none %}—{% else %}{{ "%.1f" | format(estimate.value * 100) }}&nbsp;%
{%- if estimate.low is not none %}
 <span class="interval">[{{ "%.1f" | format(estimate.low * 100) }}, {{ "%.1f" | format(estimate.high * 100) }}]</span>
{%- endif %}{% endif %}
{% endmacro %}
{% macro wins(pairs) %}
<table>
<tr><th></th><th class="number">wins</th><th class="number">ties</th><th class="number">losses</th>
<th class="number">win rate</th></tr>
{% for pair in pairs %}
<tr><td>{{ pair.first }} <span class="soft">against</span> {{ pair.second }}</td>
<td class="number">{{ pair.wins }}</td><td class="number">{{ pair.ties }}</td><td class="number">{{ pair.losses }}</td>
<td class="number">{{ share(pair.win_rate) }}</td></tr>
{% endfor %}
</table>
{% endmacro %}

<h1>{{ title }}</h1>
<p class="soft">{{ found.questions | length | counted("prompt") }} of {{ found.prompts_label }}. Judged by
{{ found.judge.name }}.</p>

{% if found.passes %}
<h2>Kept the rules <small>prompts with exact rules: the right fact, the form asked for, declined or not</small></h2>
<div class="card wide"><table>
<tr><th></th><th class="number">prompts</th>
{% for label in found.labels %}
<th class="number name">{{ label }}</th>
{% endfor %}
</tr>
{% for of_group in found.passes | batch(found.labels | length) %}
<tr><td>{{ of_group[0].group or "all" }}</td><td class="number">{{ of_group[0].prompts | thousands }}</td>
{% for item in of_group %}
<td class="number">{{ share(item.passed) }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endif %}

<h2>Who wins <small>a tie counts half; in brackets the 95 % interval (Wilson)</small></h2>
<div class="card wide">
{{ wins(found.pairs | selectattr("group", "none")) }}
{% if groups %}
<details><summary>by prompts</summary>
{% for group in groups %}
<h3>{{ group }}</h3>
{{ wins(found.pairs | selectattr("group", "equalto", group)) }}
{% endfor %}
</details>
{% endif %}
<p class="soft note">Wins, ties and losses are those of the model named first.
{% if found.judge.prompt %}
Every pair was shown in both orders, and counts as the mean of the two verdicts.
{% endif %}
{{ found.judge.duels | thousands }} of {{ found.judge.expected | thousands }} duels were judged
{%- if found.judge.malformed %}, {{ found.judge.malformed | thousands }} of them without a readable verdict: their pairs
are left out{% endif %}.
{% if found.judge.first_preferred %}
Of the clear verdicts {{ share(found.judge.first_preferred) }} went to the answer shown first; 50 % is without a bias.
{% endif %}
{% if found.judge.consistent %}
Both orders gave the same verdict for {{ share(found.judge.consistent) }} of the pairs.
{% endif %}
</p></div>

{% if found.ratings %}
<h2>Scores <small>Bradley-Terry; 400 points are odds of 10 to 1, the mean is 1000</small></h2>
<div class="card wide"><table>
<tr><th>model</th><th class="number">points</th><th class="number">95 % interval</th></tr>
{% for rating in found.ratings %}
<tr><td>{{ rating.label }}</td><td class="number">{{ "%.0f" | format(rating.points.value) }}</td>
<td class="number">
{%- if rating.points.low is none %}—{% else %}{{ "%.0f" | format(rating.points.low) }} to
{{ "%.0f" | format(rating.points.high) }}{% endif %}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if found.judge.prompt %}
<details><summary>what the judge was asked</summary><pre>{{ found.judge.prompt }}</pre></details>
{% endif %}

<h2>Answers</h2>
{% for question in found.questions %}
<div class="card question" id="q{{ loop.index }}">
<div class="head"><span class="tag info">{{ question.group }}</span><span class="soft">{{ question.id }}</span></div>
<p>{{ question.prompt }}</p>
{% if question.reference is not none %}
<div class="soft note">a right answer: {{ question.reference }}</div>
{% endif %}
<div class="answers">
{% for answer in question.answers %}
<div class="answer a{{ loop.index0 % 6 }}">
<div class="head"><span class="label">{{ found.labels[loop.index0] }}</span>
{% if question.broken is not none %}
{% set broken = question.broken[loop.index0] %}
{% if broken %}<span class="tag error">breaks {{ broken | join(", ") }}</span>
{% else %}<span class="tag good">keeps the rules</span>{% endif %}
{% endif %}
</div>
<div class="body">{{ answer if answer else "(nothing)" }}</div>
</div>
{% endfor %}
</div>
{% if question.scores %}
<div class="verdicts head">
{% for first, second, score in question.scores %}
{% if score == 0.5 %}
<span class="tag info">tie{% if several %}: {{ first }}, {{ second }}{% endif %}</span>
{% else %}
<span class="tag good">{{ first if score > 0.5 else second }} better
{%- if several %} than {{ second if score > 0.5 else first }}{% endif %}
{%- if score not in (0, 1) %}, in one order{% endif %}</span>
{% endif %}
{% endfor %}
</div>
{% endif %}
</div>
{% endfor %}
"""
