"""Write HTML pages: one file each, no script, nothing from elsewhere, light and dark."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.disk import GENERATED, write_generated
from gemma_tune.runs.evaluation import format_estimate
from gemma_tune.templates import render_template
from gemma_tune.text import counted, format_bytes, format_seconds

TEMPLATES_DIR = Path(__file__).parent / "templates"
TEXT_FILTERS: Mapping[str, Callable[..., str]] = {
    "counted": counted,
    "bytes": format_bytes,
    "duration": format_seconds,
    "estimate": format_estimate,
}


def write_page(path: Path, name: str, *, title: str, **values: Any) -> None:
    """Write the page of `<name>.html.j2` and `<name>.css` to `path`.

    All text is escaped.

    Args:
        values: what the template reads, besides `title`.
    """
    css = "".join((TEMPLATES_DIR / f"{part}.css").read_text(encoding="utf-8") for part in ("page", name))
    page = {
        "title": title,
        "generator": GENERATED,
        "style": css,
        # The browser takes this one style sheet and nothing else, whatever a row's text smuggles in.
        "style_hash": base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
    }
    text = render_template(TEMPLATES_DIR / f"{name}.html.j2", page | values, filters=TEXT_FILTERS)
    write_generated(path, text)


def write_compare_page(path: Path, comparison: Mapping[str, Any]) -> None:
    """Write a Comparison, as a mapping: who wins, and every prompt with its answers side by side."""
    labels = comparison["labels"]
    title = " against ".join(labels) if len(labels) == 2 else ", ".join(labels)
    write_page(path, "compare", title=title, found=comparison)


def write_audit_page(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Write an AuditReport, as a mapping: what was found in the rows, and their lengths."""
    write_page(path, "audit", title=title, report=report)
