"""Data templates: YAML files that say how one row becomes a prompt and a response."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from gemma_tune.data.rows.jinja_text import fields_of
from gemma_tune.data.rows.render import TEMPLATE_KINDS, TemplateKind
from gemma_tune.errors import DataError
from gemma_tune.identity import text_sha256
from gemma_tune.paths import DATA_TEMPLATES_DIR
from gemma_tune.recipe.problems import list_problems, problem_of
from gemma_tune.recipe.schema import DataSection
from gemma_tune.recipe.section import Names, NonEmpty, Section
from gemma_tune.text import did_you_mean, suggestion
from gemma_tune.yaml_io import read_yaml, read_yaml_text

MAX_TEMPLATE_BYTES = 64 * 1024


class MessageTemplate(Section):
    """One message of a chat row; `content` is Jinja."""

    role: Literal["system", "user", "assistant"]
    content: str


class _TemplateFile(Section):
    """The keys of a template file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    kind: Literal[tuple(TEMPLATE_KINDS)]  # type: ignore[valid-type]
    about: str = ""  # one line for lists
    optional: Names = ()  # fields that are empty text where a row has none
    question: NonEmpty | None = None  # the field that a user's question goes to when the model is asked
    category: NonEmpty | None = None  # the field whose value groups rows in reports
    system: str = ""  # Jinja that a text template writes before the prompt where a row has a `system`, which it prints
    prompt: str = ""  # Jinja of a text template
    response: str = ""  # Jinja of a text template
    strip_response: bool = True  # whether white space around the response is removed
    # Of a chat template whose rows hold single fields; the last one is the assistant's.
    messages: Annotated[tuple[MessageTemplate, ...], Field(strict=False)] = ()
    # Of a chat template whose rows hold whole conversations: the columns that may hold the list of {role, content} or
    # {from, value}, or a single question as text; the first one that a row has is taken.
    conversation: Names = ()
    answer: NonEmpty | None = None  # the column with the answer to a conversation; then only it is learned
    example: dict[str, Any] = Field(default_factory=dict)  # a row of the right form, shown when rows are not


class DataTemplate(_TemplateFile):
    """How one row becomes a prompt and a response."""

    required: tuple[str, ...]  # fields that every row must have as text
    sha256: str  # of `source_text` in UTF-8
    source_text: str = Field(repr=False)  # the file as it was read; `load_template` reads it back from a run

    @property
    def facts(self) -> TemplateKind:
        """What its kind decides."""
        return TEMPLATE_KINDS[self.kind]

    @property
    def needs_chat(self) -> bool:
        """Whether rows are rendered with the model's chat template."""
        return self.facts.needs_chat

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns that hold whole answers to the conversation: text, a message, or a list of messages."""
        return self.facts.answers + ((self.answer,) if self.answer else ())

    @property
    def opening(self) -> tuple[str, ...]:
        """Columns of a row that are rendered before its own turns: those of `system` and `history` that fit here."""
        has_system = bool(self.system) or (self.needs_chat and all(each.role != "system" for each in self.messages))
        names = ("system",) * has_system + ("history",) * self.needs_chat
        return tuple(name for name in names if name not in self.fields)

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of a row that the template reads, the category aside."""
        return self.required + self.optional


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


def named_templates(section: DataSection) -> list[DataTemplate]:
    """Load every template that a recipe names, without looking at rows; raises as `load_template`."""
    names = dict.fromkeys([section.template, *(part.template for part in section.mix)])
    return [load_template(name) for name in names if name is not None and name != "auto"]


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
    near = suggestion(name, list_templates())
    raise DataError(f"no such data template: {name}{near}", hint="shipped: " + ", ".join(list_templates()))


def parse_template(text: str, *, label: str) -> DataTemplate:
    """Read a template from the text of its file; `label` names the file in messages.

    Raises a DataError: not YAML, an unknown key, a Jinja mistake, a field that is declared but not used.
    """
    values, lines = read_yaml(text, label=label, error=DataError)
    if not isinstance(values, dict):
        raise DataError(f"{label} is not a data template: it has no keys", hint=_SHAPE_HINT)
    try:
        file = _TemplateFile.model_validate(values)
    except ValidationError as error:
        problems = [problem_of(item, _TemplateFile) for item in error.errors(include_url=False)]
        # The words are a recipe's, whose top-level keys are sections.
        told = list_problems(problems, label=label, lines=lines).replace("unknown section", "unknown key")
        raise DataError(f"{label} is not a data template\n{told}", hint=_SHAPE_HINT) from None
    _check_shape(file, label=label)
    if file.system and fields_of(file.system, label=f"{label}: system") != ["system"]:
        raise DataError(f"{label}: `system` must print the field system, and no other")
    sources = {"prompt": file.prompt, "response": file.response}
    sources |= {f"messages.{index}.content": message.content for index, message in enumerate(file.messages)}
    used = list(
        dict.fromkeys(name for key, source in sources.items() for name in fields_of(source, label=f"{label}: {key}"))
    )
    for name in (*file.optional, *([file.question] if file.question else [])):
        if name not in used:
            raise DataError(
                f"{label}: the field {name!r} is declared but the template does not print it",
                hint=did_you_mean(name, used) or None,
            )
    optional = tuple(name for name in used if name in file.optional)
    answers = (*TEMPLATE_KINDS[file.kind].answers, *([file.answer] if file.answer else []))
    required = (*answers, *(name for name in used if name not in optional))
    read = dict(file) | {"optional": optional}
    return DataTemplate(**read, required=required, sha256=text_sha256(text), source_text=text)


_SHAPE_HINT = (
    "kind: text has `prompt` and `response`; kind: chat has `messages` (role and content each) or `conversation` "
    "(columns that hold a list of messages)"
)


def _check_shape(file: _TemplateFile, *, label: str) -> None:
    """Refuse keys that do not go together."""
    kind, keys = TEMPLATE_KINDS[file.kind], ("prompt", "response", "messages", "conversation", "answer")
    given = [key for key in keys if key in file.model_fields_set and getattr(file, key) != ()]
    unknown = [key for key in given if not any(key in allowed for allowed in kind.keys)]
    fault = None
    if frozenset(given) not in kind.keys:
        fault = f"a {kind.name} template has {kind.shape}" + (f" and no `{unknown[0]}`" if unknown else "")
    elif file.messages and file.messages[-1].role != "assistant":
        fault = "the last message must be the assistant's: it is the answer that is learned"
    elif file.system and kind.needs_chat:
        fault = "`system` belongs to a text template; a row's system turn has its own place in a conversation"
    elif file.conversation and (file.optional or file.question):
        fault = "`optional` and `question` have no meaning beside `conversation`"
    if fault:
        raise DataError(f"{label}: {fault}", hint=_SHAPE_HINT)
