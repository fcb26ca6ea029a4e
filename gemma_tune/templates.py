"""Render a template file of the package: pages (`*.html.j2`), model cards and reports (`*.md.j2`), job files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render_template(file: Path, values: Mapping[str, Any], *, filters: Mapping[str, Callable[..., Any]] = {}) -> str:
    """Render `file`, a Jinja template that may include and extend its neighbours.

    Text is escaped in `*.html.j2`. Elsewhere the template escapes it, by the filters of its format.

    Args:
        values: every name that the template reads; one that is missing raises jinja2.UndefinedError.
        filters: those that the template uses besides Jinja's own and `thousands`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update({"thousands": lambda number: f"{number:,}", **filters})
    return environment.get_template(file.name).render(values)
