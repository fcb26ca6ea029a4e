"""Which sources a recipe names, and which data template reads each of them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gemma_tune.data.rows.template import DataTemplate, list_templates, load_template
from gemma_tune.data.rows.unread import RowFormat
from gemma_tune.data.sources.cells import CONTENT_KEYS, ROLE_KEYS, as_messages
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.data.sources.source import TINY_WORLD, Source, open_source, read_whole, split_count
from gemma_tune.errors import DataError
from gemma_tune.recipe.methods import METHODS, ROW_KINDS, MethodFacts
from gemma_tune.recipe.schema import DataSection, MixSection
from gemma_tune.text import suggestion

# What `template: auto` tries, in this order: for a base model, and before those for a model that knows chat turns.
_AUTO = ("dolly", "alpaca", "preference", "chat", "completion", "chat-completion", "text")
# Fields that one shipped template reads as text and another as messages.
_TEXT_OR_MESSAGES = ("prompt", "completion")
_AUTO_CHAT = ("dolly-chat", "alpaca-chat")


@dataclass(frozen=True)
class Input:
    """One opened source and how it is read."""

    source: Source
    template: DataTemplate
    detected: bool  # whether the template was chosen by the columns (`template: auto`)
    row_format: RowFormat
    num_rows: int | None = None  # train rows to take (`#N`); None takes all
    weight: float | None = None  # share of the mix, relative to the other weights

    def texts(self, fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        """Column and text of every text of a row that the template reads, messages one by one."""
        names = (*self.template.conversation, *self.template.fields, *self.template.opening)
        for column in dict.fromkeys(self.row_format.columns.get(name, name) for name in names):
            yield from _texts_in(column, fields.get(column))


@dataclass(frozen=True)
class Inputs:
    """Where train rows come from and, when they have a source of their own, eval rows."""

    train: tuple[Input, ...]
    eval: Input | None

    @property
    def all(self) -> tuple[Input, ...]:
        return (*self.train, self.eval) if self.eval else self.train

    @property
    def needs_chat(self) -> bool:
        """Whether a template renders rows with the model's chat template."""
        return any(item.template.needs_chat for item in self.all)

    @property
    def template(self) -> DataTemplate:
        """The template that questions are asked with: that of the first source."""
        return self.train[0].template


def open_inputs(section: DataSection, *, prefers_chat: bool) -> Inputs:
    """Open every source of a recipe and settle its template. `prefers_chat`: the model is instruction-tuned.

    Raises:
        DataError: a source or a template is missing or wrong, or they do not fit each other.
    """
    parts = section.mix or (MixSection(source=section.source or ""),)
    train = tuple(_open(part, section, prefers_chat=prefers_chat) for part in parts)
    held_out = None
    if section.eval_source is not None:
        held_out = MixSection(source=section.eval_source, split="train")
    elif section.eval_split is not None:
        held_out = MixSection(source=section.source or "", split=section.eval_split)
    elif section.source == TINY_WORLD and section.split == "train" and section.eval_fraction:
        held_out = MixSection(source=TINY_WORLD, split="eval")
    return Inputs(train, _open(held_out, section, prefers_chat=prefers_chat) if held_out else None)


def require_rows(inputs: Inputs, method: MethodFacts) -> None:
    """Refuse rows that a training method does not learn from; the DataError names the methods that train them."""
    for item in inputs.all:
        if item.template.facts.rows != method.rows:
            others = [facts.name for facts in METHODS.values() if facts.rows == item.template.facts.rows]
            raise DataError(
                f"{item.source.label} holds {ROW_KINDS[item.template.facts.rows]}, which cannot be trained by method "
                f"{method.name}; it takes {ROW_KINDS[method.rows]}",
                hint=f"set method={others[0]}"
                if others
                else "look at them with gemma-tune data audit; chosen answers are learned from rows of messages",
            )


def _open(part: MixSection, section: DataSection, *, prefers_chat: bool) -> Input:
    name, num_rows = split_count(part.source)
    # Subset, split and revision of the data section belong to its own source; an eval_source has none of them.
    whole = name == split_count(section.source or "")[0] or bool(section.mix and part in section.mix)
    source = open_source(
        name,
        subset=part.subset or (section.subset if whole else None),
        split=part.split or section.split,
        revision=part.revision or (section.revision if whole else None),
    )
    if not source.columns:
        read_whole(source)  # raises: there is not one row among the first lines
    columns = section.columns if part.columns is None else part.columns
    wanted = part.template or section.template
    if wanted != "auto":
        template = load_template(wanted)
    else:
        detected = detect_template(
            _fields_of(source, columns), prefers_chat=prefers_chat, lists=list_columns(source, columns)
        )
        if detected is None:
            raise DataError(
                f"no shipped data template fits the columns of {source.label}: {', '.join(source.columns)}",
                hint="map them, for example data.columns.instruction=QUESTION data.columns.response=ANSWER, or write "
                "a template of your own and name it as data.template",
            )
        template = detected
    _check_columns(columns, template, source, dropped=section.drop_fields)
    return Input(source, template, wanted == "auto", RowFormat.of(section, columns), num_rows, part.weight)


def _texts_in(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts_in(f"{name}[{index}]", item)
    elif isinstance(value, Mapping):
        text = next((value[key] for key in CONTENT_KEYS if key in value), None)
        yield from _texts_in(name, text)


def detect_template(columns: Sequence[str], *, prefers_chat: bool, lists: Collection[str] = ()) -> DataTemplate | None:
    """The first shipped template whose required fields are among `columns`; those in `lists` hold lists of messages."""
    order = (*_AUTO_CHAT, *_AUTO) if prefers_chat else _AUTO
    return next((template for name in order if _fits(template := load_template(name), columns, lists)), None)


def list_columns(source: Source, columns: Mapping[str, str]) -> frozenset[str]:
    """The columns, and the fields mapped to them, whose value in the first row is a list of messages."""
    first = next((row.fields for row in source.rows() if isinstance(row, SourceRow)), {})
    values = {name: first.get(column) for name, column in ({name: name for name in first} | dict(columns)).items()}
    return frozenset(name for name, value in values.items() if _holds_messages(value, name))


def _holds_messages(value: object, name: str) -> bool:
    if isinstance(value, str) and name in _TEXT_OR_MESSAGES:
        value = as_messages(value)
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _fits(template: DataTemplate, columns: Sequence[str], lists: Collection[str] = ()) -> bool:
    # The answers of a preference pair may bring the conversation themselves.
    needs_conversation = bool(template.conversation) and not template.facts.answers
    has_conversation = any(column in columns for column in template.conversation)
    if not template.conversation and any(field in lists for field in template.required):
        return False
    return (has_conversation or not needs_conversation) and all(field in columns for field in template.required)


def _fields_of(source: Source, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of a source, and the fields that are mapped to one of them."""
    return (*source.columns, *(field for field, column in columns.items() if column in source.columns))


def _check_columns(
    columns: Mapping[str, str], template: DataTemplate, source: Source, *, dropped: Collection[str]
) -> None:
    """Refuse a mapping or a template that cannot fit any row, before the rows are looked at one by one."""
    needed = {columns.get(name, name) for name in (*template.conversation, *template.required)}
    for name in dropped:
        if name in needed | {*ROLE_KEYS, *CONTENT_KEYS}:
            raise DataError(
                f"data.drop_fields: {name} is what the template {template.name} reads",
                hint="drop what rows hold besides it, or name another data.template",
            )
    known = (*template.conversation, *template.fields, *template.opening)
    category = (template.category,) if template.category else ()
    for name, column in columns.items():
        if name not in (*known, *category):
            fault, wrong, choices = f"data.columns: the template {template.name} has no field", name, known
        elif column not in source.columns:
            fault, wrong, choices = f"data.columns.{name}: {source.label} has no column", column, source.columns
        else:
            continue
        raise DataError(
            f"{fault} {wrong!r}{suggestion(wrong, choices)}",
            hint=f"its {'fields' if choices is known else 'columns'}: {', '.join(choices)}",
        )
    missing = [column for name in template.required if (column := columns.get(name, name)) not in source.columns]
    places = [columns.get(name, name) for name in template.conversation]
    if places and not template.facts.answers and not any(column in source.columns for column in places):
        missing.insert(0, " or ".join(places))
    if missing:
        fitting = [
            name
            for name in list_templates()
            if name != template.name and _fits(load_template(name), _fields_of(source, columns))
        ]
        mapped = f"map it: data.columns.{missing[0].split()[0]}=COLUMN"
        raise DataError(
            f"{source.label} has no column {', '.join(missing)}, which the template {template.name} needs; "
            f"its columns: {', '.join(source.columns)}",
            hint=f"these columns fit data.template={fitting[0]}" if fitting else mapped,
        )
