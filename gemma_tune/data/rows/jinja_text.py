"""The Jinja of data templates: fields, conditions and a few filters; what was printed from a row stays known.

No loops, calls or assignments, and few nodes that are nested little, so that compiling and rendering always end and
the output is bounded. Row text is only ever a value, never a template.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_tune.errors import DataError
from gemma_tune.text import shorten

MAX_RENDERED_CHARS = 16 * 1024 * 1024
# Of one piece of Jinja. Python takes minutes to compile what is nested 300 deep.
MAX_NODES, MAX_DEPTH = 5_000, 60
ALLOWED_FILTERS = ("trim", "lower", "upper", "capitalize", "title", "default")
_ALLOWED_TESTS = ("defined", "undefined", "none", "string")
_ALLOWED_NODES: tuple[type[nodes.Node], ...] = (
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.If,
    nodes.CondExpr,
    nodes.Filter,
    nodes.Test,
    nodes.Not,
    nodes.And,
    nodes.Or,
    nodes.Compare,
    nodes.Operand,
)
# Around every value that a template prints. Private-use characters that a row may hold as well, so row text that holds
# them is escaped before it is marked (see `_mark`).
_OPEN, _CLOSE, _ESCAPE = "\ue0f0", "\ue0f1", "\ue0f2"
_SPECIAL_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_ESCAPE}]")
_PIECES = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")


def _mark(value: object) -> str:
    """A printed value, marked as row text. Marks inside it are escaped, so no row can end its own mark."""
    escaped = _SPECIAL_MARKS.sub(lambda found: _ESCAPE + str(ord(found[0]) - ord(_OPEN)), str(value))
    return f"{_OPEN}{escaped}{_CLOSE}"


_ESCAPED = re.compile(f"{_ESCAPE}([012])")


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(ord(_OPEN) + int(found[1])), text)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_mark,
)
_ENVIRONMENT.globals.clear()


def fields_of(source: str, *, label: str) -> Sequence[str]:
    """The fields that a piece of Jinja reads, in order of appearance; refuses what could run without end."""
    if _SPECIAL_MARKS.search(source):
        raise DataError(f"{label}: holds one of the private-use characters U+E0F0 to U+E0F2", hint="remove it")
    try:
        tree = _ENVIRONMENT.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{label}, line {error.lineno}: {shorten(str(error.message), num_chars=200)}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of more than 4,300 digits
        raise DataError(f"{label}: nested too deeply, or a number that is too large") from error
    for count, (node, depth) in enumerate(_walk(tree)):
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise DataError(
                f"{label}: more than {MAX_NODES:,} expressions and texts, or more than {MAX_DEPTH} inside one another"
            )
        what = None
        if not isinstance(node, _ALLOWED_NODES):
            what = type(node).__name__
        elif isinstance(node, nodes.Filter) and node.name not in ALLOWED_FILTERS:
            what = f"the filter {node.name}"
        elif isinstance(node, nodes.Test) and node.name not in _ALLOWED_TESTS:
            what = f"the test {node.name}"
        if what:
            raise DataError(
                f"{label}, line {node.lineno}: {what} is not allowed in a data template",
                hint=f"a template may use fields, if/elif/else and the filters {', '.join(ALLOWED_FILTERS)}",
            )
    # Only now: compiling computes constant expressions, however large.
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{label}, line {error.lineno}: {error.message}") from None
    undeclared = meta.find_undeclared_variables(tree)
    fields = list(dict.fromkeys(name.name for name in tree.find_all(nodes.Name) if name.name in undeclared))
    try:
        render_text(source, dict.fromkeys(fields, "text"))
    except DataError as error:
        raise DataError(f"{label}: {error.message}", hint=error.hint) from None
    return fields


def _walk(tree: nodes.Template) -> Iterator[tuple[nodes.Node, int]]:
    """Yield every node below the tree in the order of the text, and how many nodes it stands in."""
    pending = [(child, 0) for child in reversed(tree.body)]
    while pending:
        node, depth = pending.pop()
        yield node, depth
        pending += [(child, depth + 1) for child in reversed(list(node.iter_child_nodes()))]


@functools.lru_cache(maxsize=256)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


def render_pieces(source: str, values: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Render Jinja and tell the template's own text from the values it printed.

    Returns:
        Pieces in order, none of them empty: the text, and whether it came from a value.

    Raises:
        DataError: a field is missing from `values`, or the output passes MAX_RENDERED_CHARS.
    """
    rendered: list[str] = []
    length = 0
    try:
        for part in _compiled(source).generate(values):
            length += len(part)
            if length > MAX_RENDERED_CHARS:
                raise DataError(f"a rendered row is longer than {MAX_RENDERED_CHARS:,} characters")
            rendered.append(part)
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: a text compared with a number, too many arguments
        raise DataError(f"the data template cannot be rendered: {error}") from None
    pieces: list[tuple[str, bool]] = []
    for index, text in enumerate(_PIECES.split("".join(rendered))):
        if text:
            pieces.append((_unescape(text), True) if index % 2 else (text, False))
    return pieces


def render_text(source: str, values: Mapping[str, str]) -> str:
    """Render Jinja to one string; raises as `render_pieces` does."""
    return "".join(text for text, _ in render_pieces(source, values))
