from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gemma_tune.reporting.pages import write_audit_page

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}</style></title>"


def _report(**changes: Any) -> dict[str, Any]:
    report: dict[str, Any] = {
        "rows": 3, "train_rows": 2, "eval_rows": 1, "bad_rows": 1, "tokens": 1200, "supervised_tokens": 300,
        "supervised_share": 0.25, "max_seq_tokens": 128, "length_p50": 60, "length_p90": 190, "length_p99": 190,
        "length_max": 190, "categories": (("open_qa", 3),), "languages": (("en", 2), ("?", 1)), "language_rows": 3,
        "length_bins": ({"low": 49, "high": 64, "count": 2}, {"low": 129, "high": 192, "count": 1}),
        "findings": (
            {
                "kind": "leak_exact", "severity": "error", "count": 1, "summary": "1 row leaks", "option": None,
                "samples": (("rows.jsonl:3", "the same as rows.jsonl:1"),), "places": "rows.jsonl: 3",
            },
        ),
    }  # fmt: skip
    return report | changes


def _write(path: Path, report: dict[str, Any], title: str = "rows") -> str:
    write_audit_page(path / "audit.html", report, title)
    return (path / "audit.html").read_text(encoding="utf-8")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(page)
    return parser.tags


def test_page_tells_what_was_found(tmp_path: Path) -> None:
    page = _write(tmp_path, _report())
    for text in ("1 row leaks", "rows.jsonl:3", "1,200", "25.0 %", "leak_exact", "1 error ·"):
        assert text in page
    assert 'class="over"' in page and 'class="bar"' in page


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    finding = {
        "kind": HOSTILE, "severity": "info", "count": 50, "summary": HOSTILE, "option": HOSTILE,
        "samples": ((HOSTILE, HOSTILE),), "places": HOSTILE,
    }  # fmt: skip
    report = _report(findings=(finding,), categories=((HOSTILE, 1),), languages=((HOSTILE, 1),))
    page = _write(tmp_path, report, HOSTILE)
    tags = _tags(page)
    assert {name for name, _ in tags}.isdisjoint({"script", "img", "iframe", "link", "object"})
    assert [name for name, _ in tags].count("style") == 1
    assert not any(key.startswith("on") or key == "style" for _, attributes in tags for key in attributes)
    assert "{{ 7*7 }}" in page and "&lt;script&gt;" in page


def test_page_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = _write(tmp_path, _report())
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", page)
    policy = next(attributes for name, attributes in _tags(page) if attributes.get("http-equiv"))["content"] or ""
    style = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_page_of_nothing(tmp_path: Path) -> None:
    page = _write(tmp_path, _report(findings=(), length_bins=(), categories=(), languages=()))
    assert "Nothing was found" in page and "<svg" not in page


def test_half_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    assert "\\ud83d" in _write(tmp_path, _report(categories=(("\ud83d", 1),)))


def test_no_rows_no_chart(tmp_path: Path) -> None:
    assert "<svg" in _write(tmp_path, _report()) and "<svg" not in _write(tmp_path, _report(length_bins=()))
