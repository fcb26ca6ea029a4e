"""Template files: what is escaped, and what is an error."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from gemma_tune.templates import render_template


def test_only_pages_are_escaped(tmp_path: Path) -> None:
    for name in ("a.html.j2", "a.md.j2"):
        (tmp_path / name).write_text(
            "{% if number %}\n  {{ number | thousands }}{{ text | twice }}\n{% endif %}\nend\n"
        )
    values, filters = {"number": 12345, "text": "<&"}, {"twice": lambda text: text * 2}
    assert render_template(tmp_path / "a.html.j2", values, filters=filters) == "  12,345&lt;&amp;&lt;&amp;\nend\n"
    assert render_template(tmp_path / "a.md.j2", values, filters=filters) == "  12,345<&<&\nend\n"


def test_a_value_that_is_missing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.sh.j2").write_text("{{ nothing }}")
    with pytest.raises(jinja2.UndefinedError, match="nothing"):
        render_template(tmp_path / "a.sh.j2", {})
