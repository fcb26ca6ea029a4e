"""Data templates: YAML files that say how one row becomes a prompt and a response.

A template is data, not code: its Jinja may use fields, conditions and a few filters, but no loops, calls or
assignments, so that rendering always ends and its output is bounded. Row text is only ever a value, never a template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, StringConstraints, ValidationError

from gemma_tune.data.rows.kinds import TEMPLATE_KINDS, KindName, TemplateKind
from gemma_tune.errors import DataError
from gemma_tune.identity import text_sha256
from gemma_tune.paths import DATA_TEMPLATES_DIR
from gemma_tune.recipe.methods import RowKind
from gemma_tune.recipe.problems import problem_of
from gemma_tune.recipe.schema import DataSection
from gemma_tune.recipe.section import Names, NonEmpty, Section
from gemma_tune.text import did_you_mean
from gemma_tune.yaml_io import read_yaml, read_yaml_text

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_RENDERED_CHARS = 16 * 1024 * 1024
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


@dataclass(frozen=True)
class MessageTemplate:
    """One message of a chat row; `content` is Jinja."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class DataTemplate:
    """How one row becomes a prompt and a response."""

    name: str  # what the recipe calls it
    # `text` joins prompt and response as plain text and ends with the tokenizer's eos; `chat` renders messages with the
    # model's own chat template and ends with its turn end; `preference` reads a conversation with a chosen and a
    # rejected answer, both in chat turns
    kind: KindName
    about: str  # one line for lists
    required: tuple[str, ...]  # fields that every row must have as text
    optional: tuple[str, ...]  # fields that are empty text where a row has none
    # the field a user's question goes to when the model is asked; None where rows hold whole conversations
    question: str | None
    category: str | None  # the field whose value groups rows in reports
    prompt: str  # Jinja of a text template
    response: str  # Jinja of a text template
    strip_response: bool  # whether white space around the response is removed
    # of a chat template whose rows hold single fields; the last one is the assistant's
    messages: tuple[MessageTemplate, ...]
    # of a chat template whose rows hold whole conversations: the columns that may hold the list of {role, content} or
    # {from, value}, or a single question as text; the first one that a row has is taken
    conversation: tuple[str, ...]
    example: Mapping[str, object] = field(compare=False, repr=False)  # a row of the right form, shown when rows are not
    sha256: str  # of `source_text` in UTF-8
    source_text: str = field(repr=False)  # the file as it was read; `load_template` reads it back from a run

    @property
    def rows(self) -> RowKind:
        """What a row holds, as training methods call it."""
        return self.facts.rows

    @property
    def needs_chat(self) -> bool:
        """Whether rows are rendered with the model's chat template."""
        return self.facts.needs_chat

    @property
    def facts(self) -> TemplateKind:
        """What its kind decides."""
        return TEMPLATE_KINDS[self.kind]

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of a row that the template reads, the category aside."""
        return self.required + self.optional


class _MessageFile(Section):
    role: Literal["system", "user", "assistant"]
    content: str


class _TemplateFile(Section):
    """The keys of a template file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    kind: KindName
    about: str = ""
    optional: Names = ()
    question: NonEmpty | None = None
    category: NonEmpty | None = None
    prompt: str | None = None
    response: str | None = None
    strip_response: bool = True
    messages: Annotated[tuple[_MessageFile, ...], Field(strict=False)] = ()
    conversation: Names = ()
    example: dict[str, Any] = Field(default_factory=dict)


def list_templates() -> list[str]:
    """The names of the shipped templates, sorted."""
    return sorted(path.stem for path in DATA_TEMPLATES_DIR.glob("*.yaml"))


def load_template(name_or_path: str | Path) -> DataTemplate:
    """Read a shipped template by name, or any template by the path of its .yaml file.

    Raises:
        DataError: there is no such template, or its file is wrong; the message names the file and the key.
    """
    path = _find(str(name_or_path))
    text = read_yaml_text(path, max_bytes=MAX_TEMPLATE_BYTES, what="a data template", error=DataError)
    return parse_template(text, label=path.name)


def check_named(section: DataSection) -> None:
    """Load every template that a recipe names, without looking at rows.

    Raises:
        DataError: as `load_template`.
    """
    for name in dict.fromkeys([section.template, *(part.template for part in section.mix)]):
        if name is not None and name != "auto":
            load_template(name)


def _find(name: str) -> Path:
    if name in list_templates():
        return DATA_TEMPLATES_DIR / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise DataError(
            f"no such data template: {path}", hint="give a .yaml file, or one of: " + ", ".join(list_templates())
        )
    near = did_you_mean(name, list_templates())
    raise DataError(
        f"no such data template: {name}" + (f"; {near}" if near else ""), hint="shipped: " + ", ".join(list_templates())
    )


def parse_template(text: str, *, label: str) -> DataTemplate:
    """A template from the text of its file; `label` names the file in messages.

    Raises:
        DataError: not YAML, an unknown key, a Jinja mistake, a field that is declared but not used.
    """
    values, _ = read_yaml(text, label=label, error=DataError)
    try:
        file = _TemplateFile.model_validate(values)
    except ValidationError as error:
        problems = [problem_of(item, _TemplateFile) for item in error.errors(include_url=False)]
        # The words are a recipe's, whose top-level keys are sections.
        told = "\n".join(
            f"  {problem.path}: {problem.message}".replace("unknown section", "unknown key") for problem in problems
        )
        raise DataError(f"{label} is not a data template\n{told}", hint=_SHAPE_HINT) from None
    _check_shape(file, label=label)
    sources = {"prompt": file.prompt or "", "response": file.response or ""}
    sources |= {f"messages.{index}.content": message.content for index, message in enumerate(file.messages)}
    used = list(
        dict.fromkeys(name for key, source in sources.items() for name in _fields_of(source, label=f"{label}: {key}"))
    )
    for name in (*file.optional, *([file.question] if file.question else [])):
        if name not in used:
            raise DataError(
                f"{label}: the field {name!r} is declared but the template does not print it",
                hint=did_you_mean(name, used) or None,
            )
    return DataTemplate(
        name=file.name,
        kind=file.kind,
        about=file.about,
        required=(*TEMPLATE_KINDS[file.kind].answers, *(name for name in used if name not in file.optional)),
        optional=tuple(name for name in used if name in file.optional),
        question=file.question,
        category=file.category,
        prompt=file.prompt or "",
        response=file.response or "",
        strip_response=file.strip_response,
        messages=tuple(MessageTemplate(role=message.role, content=message.content) for message in file.messages),
        conversation=file.conversation,
        example=file.example,
        sha256=text_sha256(text),
        source_text=text,
    )


_SHAPE_HINT = (
    "kind: text has `prompt` and `response`; kind: chat has `messages` (role and content each) or `conversation` "
    "(columns that hold a list of messages)"
)


def _check_shape(file: _TemplateFile, *, label: str) -> None:
    """Refuse keys that do not go together."""
    kind, keys = TEMPLATE_KINDS[file.kind], ("prompt", "response", "messages", "conversation")
    given = [key for key in keys if getattr(file, key) not in (None, ())]
    unknown = [key for key in given if not any(key in allowed for allowed in kind.keys)]
    fault = None
    if frozenset(given) not in kind.keys:
        fault = f"a {kind.name} template has {kind.shape}" + (f" and no `{unknown[0]}`" if unknown else "")
    elif file.messages and file.messages[-1].role != "assistant":
        fault = "the last message must be the assistant's: it is the answer that is learned"
    elif file.conversation and (file.optional or file.question):
        fault = "`optional` and `question` have no meaning beside `conversation`"
    if fault:
        raise DataError(f"{label}: {fault}", hint=_SHAPE_HINT)


# --- Jinja ------------------------------------------------------------------------------------------------------------


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


def _fields_of(source: str, *, label: str) -> Sequence[str]:
    """The fields that a piece of Jinja reads, in order of appearance; refuses what could run without end."""
    if _SPECIAL_MARKS.search(source):
        raise DataError(f"{label}: holds one of the private-use characters U+E0F0 to U+E0F2", hint="remove it")
    try:
        tree = _ENVIRONMENT.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{label}, line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise DataError(f"{label}: nested too deeply") from None
    for node in tree.find_all(nodes.Node):
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
    return list(dict.fromkeys(name.name for name in tree.find_all(nodes.Name) if name.name in undeclared))


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
    except jinja2.UndefinedError as error:
        raise DataError(f"the data template cannot be rendered: {error.message}") from None
    pieces: list[tuple[str, bool]] = []
    for index, text in enumerate(_PIECES.split("".join(rendered))):
        if text:
            pieces.append((_unescape(text), True) if index % 2 else (text, False))
    return pieces


def render_text(source: str, values: Mapping[str, str]) -> str:
    """Render Jinja to one string; raises as `render_pieces` does."""
    return "".join(text for text, _ in render_pieces(source, values))
