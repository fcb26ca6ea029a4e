"""The page of a comparison: everything of a row is text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.reporting.pages import write_compare_page

EVIL = "</div><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def comparison(*labels: str) -> dict[str, Any]:
    return {
        "labels": labels,
        "prompts_label": "mine & yours",
        "judge": {
            "name": "judge <b>", "prompt": "Which one? {first}", "duels": 3, "expected": 4, "malformed": 1,
            "first_preferred": estimate(0.5), "consistent": None,
        },
        "pairs": [
            {"first": labels[0], "second": labels[1], "group": None, "wins": 1, "ties": 2, "losses": 0,
             "win_rate": estimate(0.625)},
            {"first": labels[0], "second": labels[1], "group": "g", "wins": 0, "ties": 0, "losses": 0,
             "win_rate": None},
        ],
        "ratings": [{"label": label, "points": estimate(1000.0)} for label in labels] if len(labels) > 2 else [],
        "passes": [{"label": label, "group": None, "prompts": 2, "passed": estimate(0.5)} for label in labels],
        "questions": [
            {"id": "q", "group": EVIL, "prompt": EVIL, "reference": EVIL, "answers": [EVIL, "", *labels[2:]],
             "broken": [["contains"], [], *([] for _ in labels[2:])], "scores": [[labels[0], labels[1], 0.75]]},
            {"id": "r", "group": "g", "prompt": "x\ud800", "reference": None, "answers": ["a", "b", *labels[2:]],
             "broken": None, "scores": [[labels[0], labels[1], 0.5]]},
        ],
    }  # fmt: skip


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(params=[("a", "b"), ("a", "b", "c")], ids=["two", "three"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    write_compare_page(tmp_path / "page.html", comparison(*request.param))
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_models_wrote_is_text(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "b", "link", "iframe", "a"} & set(tags.names)
    assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert tags.text.count(EVIL) == 4
    assert "(nothing)" in tags.text and "breaks contains" in tags.text and "keeps the rules" in tags.text
    assert "62.5\u00a0%" in tags.text and "Which one? {first}" in tags.text and "judge <b>" in tags.text


def test_only_its_own_style_is_let_in(page: str) -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in page


def test_scores_are_for_three(page: str) -> None:
    assert ("Bradley-Terry" in page) == ("<h1>a, b, c</h1>" in page)
    assert ("a better than b, in one order" in page) == ("<h1>a, b, c</h1>" in page)
