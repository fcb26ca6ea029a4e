"""The audit of the rows as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.reporting.charts import bar_chart
from gemma_tune.reporting.page import write_page


def write_audit_page(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Write `report`, an AuditReport as a mapping, to `path`."""
    write_page(
        Path(path),
        title=title,
        body=_BODY,
        style=_STYLE,
        values={
            "report": report,
            "chart": bar_chart(report["length_bins"], limit=report["max_seq_tokens"]),
            "severities": {
                name: sum(found["severity"] == name for found in report["findings"])
                for name in ("error", "warning", "info")
            },
        },
    )


_STYLE = """
.finding { margin-bottom: 10px; border-left-width: 4px; }
.finding.error { border-left-color: var(--error); } .finding.warning { border-left-color: var(--warning); }
.finding.info { border-left-color: var(--info); }
.summary { flex: 1 1 320px; overflow-wrap: anywhere; }
.kind { margin-top: 4px; font-size: 13px; color: var(--soft); }
.finding td:first-child { width: 24%; color: var(--soft); }
.places { max-height: 120px; overflow: auto; margin-top: 8px; color: var(--soft); overflow-wrap: anywhere; }
.columns table { margin-top: 0; } .columns tr:first-child td { border-top: 0; }
"""

_BODY = """
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
{{ chart }}
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
"""
