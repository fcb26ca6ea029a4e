"""The audit of the rows as one HTML file: no scripts, nothing from elsewhere (jinja2 is imported when it writes)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _FOOT, _HEAD = 720, 200, 22, 18
# Where there are more bins than fit, only some are labelled.
_MAX_LABELS = 18


def write_audit_page(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Write `report`, an AuditReport as a mapping, to `path`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda value: f"{value:,}"
    environment.filters["counted"] = lambda value, noun: f"{value:,} {noun}" + ("" if value == 1 else "s")
    page = environment.from_string(_PAGE).render(
        title=title,
        report=report,
        style=_STYLE,
        # The browser takes this one style sheet and nothing else, whatever a row's text smuggles in.
        style_hash=base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode(),
        chart=_chart(report["length_bins"], limit=report["max_seq_tokens"]),
        severities={
            name: sum(found["severity"] == name for found in report["findings"])
            for name in ("error", "warning", "info")
        },
        width=_WIDTH,
        height=_HEIGHT + _FOOT + _HEAD,
    )
    # Half a surrogate pair, which a broken row can hold, is no character of UTF-8.
    Path(path).write_bytes(page.encode("utf-8", errors="backslashreplace"))


def _chart(bins: Sequence[Mapping[str, int]], *, limit: int) -> list[dict[str, Any]]:
    """Place and labels of every bar, in the units of the SVG."""
    if not bins:
        return []
    highest = max(one["count"] for one in bins) or 1
    step = _WIDTH / len(bins)
    every = -(-len(bins) // _MAX_LABELS)
    return [
        {
            "x": f"{at * step + step * 0.08:.1f}",
            "y": f"{_HEAD + _HEIGHT * (1 - one['count'] / highest):.1f}",
            "width": f"{step * 0.84:.1f}",
            "height": f"{_HEIGHT * one['count'] / highest:.1f}",
            "middle": f"{(at + 0.5) * step:.1f}",
            "above": f"{_HEAD + _HEIGHT * (1 - one['count'] / highest) - 5:.1f}",
            "count": one["count"],
            "low": one["low"],
            "high": one["high"],
            "labelled": at % every == 0,
            "over": one["low"] > limit,
        }
        for at, one in enumerate(bins)
    ]


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --soft: #5b6678; --line: #e1e5eb;
  --bar: #3b6fd4; --over: #d1495b; --error: #b3263e; --warning: #8f5b00; --info: #2a5fb0;
  --error-back: #fdecef; --warning-back: #fff4dc; --info-back: #e8f0fd; --code: #eef1f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1f28; --ink: #e6eaf1; --soft: #9aa6b8; --line: #2b3340;
    --bar: #6f9bf0; --over: #ee7486; --error: #ff8fa0; --warning: #f0bd5e; --info: #8fb6fa;
    --error-back: #3a1c24; --warning-back: #35290f; --info-back: #1a2a45; --code: #242b37;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1040px; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 12px; }
h2 small { font-size: 13px; font-weight: 400; color: var(--soft); }
p { margin: 0; }
.soft { color: var(--soft); } .note { margin-top: 10px; font-size: 13px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.facts .card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; line-height: 1.3; }
.facts .card span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; text-anchor: middle; font-family: inherit; }
svg .bar { fill: var(--bar); } svg .over { fill: var(--over); } svg line { stroke: var(--line); }
.finding { margin-bottom: 10px; border-left-width: 4px; }
.finding.error { border-left-color: var(--error); } .finding.warning { border-left-color: var(--warning); }
.finding.info { border-left-color: var(--info); }
.head { display: flex; gap: 6px 12px; align-items: baseline; flex-wrap: wrap; }
.tag { border-radius: 999px; padding: 1px 10px; font-size: 12px; font-weight: 600; }
.tag.error { background: var(--error-back); color: var(--error); }
.tag.warning { background: var(--warning-back); color: var(--warning); }
.tag.info { background: var(--info-back); color: var(--info); }
.summary { flex: 1 1 320px; overflow-wrap: anywhere; }
code {
  background: var(--code); border-radius: 5px; padding: 1px 6px; overflow-wrap: anywhere;
  font: 13px ui-monospace, Menlo, Consolas, monospace;
}
.kind { margin-top: 4px; font-size: 13px; color: var(--soft); }
details { margin-top: 4px; font-size: 13px; } summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin-top: 8px; }
td {
  text-align: left; padding: 5px 12px 5px 0; border-top: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere;
}
.finding td:first-child { width: 24%; color: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
.places { max-height: 120px; overflow: auto; margin-top: 8px; color: var(--soft); overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
.columns table { margin-top: 0; } .columns tr:first-child td { border-top: 0; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'sha256-{{ style_hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ severities.error | counted("error") }} · {{ severities.warning | counted("warning") }} ·
{{ severities.info | counted("note") }}.
Personal values are masked on this page.</p>

<div class="facts">
<div class="card"><b>{{ report.train_rows | thousands }}</b><span>training rows</span></div>
<div class="card"><b>{{ report.eval_rows | thousands }}</b><span>eval rows</span></div>
<div class="card"><b>{{ report.bad_rows | thousands }}</b><span>rows not usable</span></div>
<div class="card"><b>{{ report.tokens | thousands }}</b><span>tokens</span></div>
<div class="card"><b>{{ "%.1f" | format(report.supervised_share * 100) }} %</b><span>of them in the loss</span></div>
</div>

<h2>Findings <small>and the recipe line that would act</small></h2>
{% for found in report.findings %}
<div class="card finding {{ found.severity }}">
<div class="head"><span class="tag {{ found.severity }}">{{ found.severity }}</span>
<p class="summary">{{ found.summary }}</p>
{% if found.option %}
<code title="the recipe line that would act on it">{{ found.option }}</code>
{% endif %}
</div>
{% if found.samples or found.places %}
<details{{ " open" if found.severity == "error" else "" }}><summary>{{ found.kind }}: where</summary>
<table>
{% for where, detail in found.samples %}
<tr><td>{{ where }}</td><td>{{ detail }}</td></tr>
{% endfor %}
</table>
{% if found.places and found.count > found.samples | length %}
<p class="places">{{ found.places }}</p>
{% endif %}
</details>
{% else %}
<p class="kind">{{ found.kind }}</p>
{% endif %}
</div>
{% else %}
<div class="card">Nothing was found.</div>
{% endfor %}

<h2>Length in tokens</h2>
<div class="card">
{% if chart %}
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="rows by length in tokens">
{% for bar in chart %}
<rect class="{{ "over" if bar.over else "bar" }}" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}"
  height="{{ bar.height }}" rx="2">
<title>{{ bar.low | thousands }} to {{ bar.high | thousands }} tokens: {{ bar.count | counted("row") }}</title></rect>
{% if bar.labelled %}
{% if bar.count %}
<text x="{{ bar.middle }}" y="{{ bar.above }}">{{ bar.count | thousands }}</text>
{% endif %}
<text x="{{ bar.middle }}" y="{{ height - 4 }}">≤ {{ bar.high | thousands }}</text>
{% endif %}
{% endfor %}
<line x1="0" x2="{{ width }}" y1="{{ height - 21 }}" y2="{{ height - 21 }}" />
</svg>
{% endif %}
<p class="soft note">Half of the rows have at most {{ report.length_p50 | thousands }} tokens, 90 % at most
{{ report.length_p90 | thousands }}, 99 % at most {{ report.length_p99 | thousands }}; the longest has
{{ report.length_max | thousands }}. Bars beyond
the limit of {{ report.max_seq_tokens | thousands }} are red.</p>
</div>

{% if report.categories or report.languages %}
<div class="columns">
{% for heading, entries, note in [
  ("Categories", report.categories, ""),
  ("Languages", report.languages, "guessed from " ~ report.language_rows ~ " rows; ? is too short or unclear"),
] if entries %}
<div><h2>{{ heading }}</h2>
<div class="card"><table>
{% for name, count in entries[:20] %}
<tr><td>{{ name }}</td><td class="number">{{ count | thousands }}</td></tr>
{% endfor %}
</table>
{% if entries | length > 20 %}
<p class="soft">and {{ entries | length - 20 }} more</p>
{% endif %}
<p class="soft">{{ note }}</p></div></div>
{% endfor %}
</div>
{% endif %}
</body>
</html>
"""
