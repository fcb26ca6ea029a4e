"""The skeleton of every HTML page that we write: one file, no scripts, nothing from elsewhere, light and dark.

jinja2 is imported when a page is written. All text is escaped; only `charts` gives markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.errors import counted
from gemma_tune.reporting.numbers import format_bytes, format_seconds


def write_page(path: Path, *, title: str, body: str, style: str = "", values: Mapping[str, Any]) -> None:
    """Write a page.

    Args:
        body: jinja2 template of what stands in <body>.
        style: CSS behind that of every page.
        values: what the template reads, besides `title`.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    loader = DictLoader({"page": _PAGE, "body": '{% extends "page" %}{% block body %}' + body + "{% endblock %}"})
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = lambda value: f"{value:,}"
    environment.filters["counted"] = counted
    environment.filters["bytes"] = format_bytes
    environment.filters["seconds"] = format_seconds
    css = _STYLE + style
    page = environment.get_template("body").render(
        **values,
        title=title,
        style=css,
        # The browser takes this one style sheet and nothing else, whatever a row's text smuggles in.
        style_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
    )
    # Half a surrogate pair, which a broken row can hold, is no character of UTF-8.
    path.write_bytes(page.encode("utf-8", errors="backslashreplace"))


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --soft: #5b6678; --line: #e1e5eb;
  --bar: #3b6fd4; --over: #d1495b; --error: #b3263e; --warning: #8f5b00; --info: #2a5fb0; --good: #1c7a45;
  --error-back: #fdecef; --warning-back: #fff4dc; --info-back: #e8f0fd; --good-back: #e6f5ec; --code: #eef1f5;
  --c0: #2f63c9; --c1: #d1495b; --c2: #1f8a5b; --c3: #a26200; --c4: #7b4bc4; --c5: #0f7f95;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1f28; --ink: #e6eaf1; --soft: #9aa6b8; --line: #2b3340;
    --bar: #6f9bf0; --over: #ee7486; --error: #ff8fa0; --warning: #f0bd5e; --info: #8fb6fa; --good: #6fd39b;
    --error-back: #3a1c24; --warning-back: #35290f; --info-back: #1a2a45; --good-back: #143324; --code: #242b37;
    --c0: #7ba5f5; --c1: #f0808f; --c2: #5fcf9a; --c3: #e3ad4f; --c4: #b795f3; --c5: #55c3d6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1040px; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 24px; line-height: 1.3; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 12px; }
h2 small { font-size: 13px; font-weight: 400; color: var(--soft); }
p { margin: 0; }
.soft { color: var(--soft); } .note { margin-top: 10px; font-size: 13px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.facts .card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; line-height: 1.3; }
.facts .card span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg text.middle { text-anchor: middle; } svg text.end { text-anchor: end; }
svg .bar { fill: var(--bar); } svg .over { fill: var(--over); } svg line { stroke: var(--line); }
.head { display: flex; gap: 6px 12px; align-items: baseline; flex-wrap: wrap; }
.tag { border-radius: 999px; padding: 1px 10px; font-size: 12px; font-weight: 600; white-space: nowrap; }
.tag.error { background: var(--error-back); color: var(--error); }
.tag.warning { background: var(--warning-back); color: var(--warning); }
.tag.info { background: var(--info-back); color: var(--info); }
.tag.good { background: var(--good-back); color: var(--good); }
code, pre { background: var(--code); font: 13px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
code { border-radius: 5px; padding: 1px 6px; }
details { margin-top: 4px; font-size: 13px; } summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; width: 100%; margin-top: 8px; }
td, th {
  text-align: left; padding: 5px 12px 5px 0; border-top: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere;
}
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
@media (max-width: 640px) {
  body { padding: 20px 14px 48px; }
  .card { padding: 12px; }
  /* Charts shrink with the page; their text must not. */
  svg text { font-size: 19px; } svg text.minor { display: none; }
  .facts { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 8px; }
}
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
{% block body %}{% endblock %}
</body>
</html>
"""
