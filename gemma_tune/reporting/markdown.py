"""Escape, quote and tabulate text of others in Markdown templates."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

# What starts or ends something inside of a line, what starts a list or a heading at its beginning, and what becomes a
# link or a mention by itself.
_MARKDOWN = re.compile(
    r"[\\`*\[\]#|!~>@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.|^[-+=]|(?<=^\d)[.)](?=\s|$)"
)


def escaped(text: str) -> str:
    """Return text of somebody else on one line, in which Markdown and HTML mean nothing."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\g<0>", line)


def table(rows: Iterable[Sequence[str]], *header: str) -> str:
    """Return a table whose header is ours and whose cells are escaped."""
    lines = [header, ["---"] * len(header), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(code: str, language: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, code.removesuffix("\n"), fence])


MARKDOWN_FILTERS: Mapping[str, Callable[..., str]] = {"escaped": escaped, "table": table, "fenced": fenced}
