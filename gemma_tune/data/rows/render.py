"""From a row and a data template to segments, for training and for asking."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.data.rows.template import DataTemplate, MessageTemplate, render_pieces, render_text
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.errors import DataError

# The names under which the three roles are known: OpenAI's messages, ShareGPT's conversations, Gemma's own turns.
ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
END_OF_TEXT = Segment("", supervised=True, control=True, stop=True)


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered row."""

    where: str  # the row's place in its source
    segments: tuple[Segment, ...]  # the last one is a supervised stop token; the encoder puts the BOS before them
    question: str  # what the row asks: the question field, or the last message of the user
    response: str  # the last answer, without the stop token; what a model's answer is compared with
    category: str | None  # the row's category, where it has one
    key: bytes  # a hash of the fields or messages that the template reads, white space at their ends aside

    @property
    def prompt_segments(self) -> tuple[Segment, ...]:
        """The segments before the last answer: what the model is given when it is asked."""
        end = len(self.segments)
        while end and self.segments[end - 1].supervised:
            end -= 1
        return self.segments[:end]

    @property
    def prompt_text(self) -> str:
        """Everything before the last answer as text, without the BOS."""
        return "".join(segment.text for segment in self.prompt_segments)

    @property
    def num_characters(self) -> int:
        """Of all segments."""
        return sum(len(segment.text) for segment in self.segments)

    @property
    def own_texts(self) -> tuple[str, ...]:
        """The row's own pieces of text, without what the template adds."""
        return tuple(segment.text for segment in self.segments if not segment.control)


def render_example(
    template: DataTemplate, row: SourceRow, *, columns: Mapping[str, str], chat: ChatRenderer | None
) -> Example:
    """Render one row for training. `columns` maps a template's field to a row's column; `chat` is for chat templates.

    Raises:
        RowError: the row lacks a field, a field is not text, the answer is empty, or the chat template refuses the row.
        DataError: a chat template without `chat`.
    """
    rendered = _RENDER[template.kind](template, row, columns=columns, chat=chat)
    _check_encodable(rendered.segments, where=row.where)
    category = row.fields.get(columns.get(template.category, template.category)) if template.category else None
    return Example(
        where=row.where,
        segments=rendered.segments,
        question=rendered.question,
        response=rendered.response,
        category=category if isinstance(category, str) and category else None,
        key=_key(rendered.key_parts),
    )


class _Rendered(NamedTuple):
    """What a kind of template makes of a row; `key_parts` are the names and texts that decide the key."""

    segments: tuple[Segment, ...]
    question: str
    response: str
    key_parts: Iterable[tuple[str, str]]


def _render_text(
    template: DataTemplate, row: SourceRow, *, columns: Mapping[str, str], chat: ChatRenderer | None
) -> _Rendered:
    values = _row_values(template, row, columns=columns)
    response = render_text(template.response, values)
    response = response.strip() if template.strip_response else response
    if not response.strip():
        raise RowError(row.where, "the response is empty")
    segments = (*_text_prompt(template, values), Segment(response, supervised=True, control=False), END_OF_TEXT)
    return _Rendered(segments, values.get(template.question or "", ""), response, sorted(values.items()))


def _render_chat(
    template: DataTemplate, row: SourceRow, *, columns: Mapping[str, str], chat: ChatRenderer | None
) -> _Rendered:
    if template.conversation:
        messages = _conversation(template, row.fields, columns=columns, where=row.where)
        return _render_messages(messages, _parts_of(messages), chat=chat, where=row.where)
    values = _row_values(template, row, columns=columns)
    return _render_messages(_messages(template.messages, values), sorted(values.items()), chat=chat, where=row.where)


def _render_preference(
    template: DataTemplate, row: SourceRow, *, columns: Mapping[str, str], chat: ChatRenderer | None
) -> _Rendered:
    messages = _preference(template, row.fields, columns=columns, chat=chat, where=row.where)
    return _render_messages(messages, _parts_of(messages), chat=chat, where=row.where)


def _render_messages(
    messages: Sequence[dict[str, str]],
    key_parts: Iterable[tuple[str, str]],
    *,
    chat: ChatRenderer | None,
    where: str,
) -> _Rendered:
    segments = _renderer(chat).row(messages, where=where)
    question = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    # The renderer has checked that the last message is an answer; its text is the last but one segment.
    return _Rendered(segments, question, segments[-2].text, key_parts)


def _parts_of(messages: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


# Kind of template → what renders a row with it.
_RENDER: Mapping[str, Callable[..., _Rendered]] = {
    "text": _render_text,
    "chat": _render_chat,
    "preference": _render_preference,
}


def render_prompt(
    template: DataTemplate, fields: Mapping[str, object], *, chat: ChatRenderer | None
) -> tuple[Segment, ...]:
    """The segments that ask the model for an answer, exactly as they stand before it in training.

    `fields` holds what the template's prompt reads, such as `{"instruction": …, "context": …}`, or the list of messages
    of a conversation; the response is not needed. See `question_fields` for a single question.

    Raises:
        RowError, DataError: as `render_example`.
    """
    where = "the question"
    if not template.needs_chat:
        return _text_prompt(template, _values(template, fields, where=where, answered=False))
    if template.conversation:
        messages = _conversation(template, fields, columns={}, where=where)
    else:
        values = _values(template, fields, where=where, answered=False)
        messages = _messages(template.messages[:-1], values)
    segments = _renderer(chat).prompt(messages, where=where)
    _check_encodable(segments, where=where)
    return segments


def question_fields(template: DataTemplate, question: str) -> dict[str, object]:
    """The fields of a row that asks `question` and nothing else.

    Raises:
        DataError: the template does not say which of its fields a question goes to.
    """
    if template.conversation:
        return {template.conversation[0]: [{"role": "user", "content": question}]}
    if template.question is None:
        raise DataError(
            f"the data template {template.name} does not say which field holds the question",
            hint=f"add `question: FIELD` to it, one of: {', '.join(template.fields)}",
        )
    return {template.question: question}


def _renderer(chat: ChatRenderer | None) -> ChatRenderer:
    if chat is None:
        raise DataError(
            "a chat data template needs the model's chat template", hint="take a plain data template such as dolly"
        )
    return chat


def _check_encodable(segments: tuple[Segment, ...], *, where: str) -> None:
    """JSON can spell half of a surrogate pair (`"\\ud83d"`), which is no character and cannot be tokenized."""
    for segment in segments:
        try:
            segment.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(where, f"holds half a character (\\u{ord(segment.text[error.start]):04x})") from None


def _values(
    template: DataTemplate, fields: Mapping[str, object], *, where: str, answered: bool = True
) -> dict[str, str]:
    """The template's fields as text. With `answered` off a missing field is empty: the response is not there yet."""
    values: dict[str, str] = {}
    for name in template.fields:
        value = fields.get(name)
        if value is None and (not answered or name in template.optional):
            value = ""
        if not isinstance(value, str):
            found = "is missing" if name not in fields or value is None else f"is {type(value).__name__}, not text"
            raise RowError(where, f"{name} {found}")
        values[name] = value
    return values


def _row_values(template: DataTemplate, row: SourceRow, *, columns: Mapping[str, str]) -> dict[str, str]:
    named = {columns.get(name, name): name for name in template.fields}
    return _values(template, {name: row.fields.get(column) for column, name in named.items()}, where=row.where)


def _text_prompt(template: DataTemplate, values: Mapping[str, str]) -> tuple[Segment, ...]:
    return tuple(
        Segment(text, supervised=False, control=not from_row)
        for text, from_row in render_pieces(template.prompt, values)
    )


def _messages(templates: Sequence[MessageTemplate], values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": render_text(message.content, values).strip()} for message in templates]


def _key(parts: Iterable[tuple[str, str]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, text in parts:
        stripped = text.strip()
        digest.update(f"{name}:{len(stripped)}:{stripped};".encode(errors="surrogatepass"))
    return digest.digest()


def _conversation(
    template: DataTemplate, row: Mapping[str, object], *, columns: Mapping[str, str], where: str
) -> list[dict[str, str]]:
    names = [columns.get(name, name) for name in template.conversation]
    column = next((name for name in names if row.get(name) is not None), None)
    if column is None:
        raise RowError(where, f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing")
    value = row[column]
    if isinstance(value, str) and value.strip() and template.facts.answers:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError(
            where, f"{column} is {'an empty list' if value == [] else type(value).__name__}, not a list of messages"
        )
    return [_message(item, where=f"{column}[{index}]", row=where) for index, item in enumerate(value)]


def _preference(
    template: DataTemplate,
    row: Mapping[str, object],
    *,
    columns: Mapping[str, str],
    chat: ChatRenderer | None,
    where: str,
) -> list[dict[str, str]]:
    """The conversation with its chosen answer; the rejected one is rendered as well, so that its faults are told.

    An answer is text, a message, or a list of messages: the last one of it counts, and without a conversation column
    those before it are the conversation.
    """
    names = [columns.get(name, name) for name in template.conversation]
    has_prompt = any(row.get(name) is not None for name in names)
    prompt = _conversation(template, row, columns=columns, where=where) if has_prompt else None
    answered = []
    for side in template.facts.answers:
        column = columns.get(side, side)
        value = row.get(column)
        if isinstance(value, str):
            messages = [{"role": "assistant", "content": value}]
        else:
            items = value if isinstance(value, list) else [value]
            messages = [_message(item, where=column, row=where) for item in items]
        if prompt is None and len(messages) < 2:
            raise RowError(
                where, f"{' and '.join(names)} are missing, and {column} holds no question before its answer"
            )
        conversation = [*(messages[:-1] if prompt is None else prompt), messages[-1]]
        _renderer(chat).row(conversation, where=f"{where}: {side}")
        answered.append(conversation)
    if answered[0] == answered[1]:
        raise RowError(where, "chosen and rejected are the same")
    if answered[0][:-1] != answered[1][:-1]:
        raise RowError(where, "chosen and rejected answer different conversations")
    return answered[0]


def _message(item: object, *, where: str, row: str) -> dict[str, str]:
    """One message as role and content, from either of the two spellings."""
    if not isinstance(item, Mapping):
        raise RowError(row, f"{where} is {type(item).__name__}, not a message with role and content")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, content_key):
        if not isinstance(item.get(key), str):
            found = "is missing" if item.get(key) is None else f"is {type(item[key]).__name__}, not text"
            raise RowError(row, f"{where}: {key} {found}")
    role = ROLES.get(item[role_key])
    if role is None:
        raise RowError(row, f"{where}: unknown {role_key} {item[role_key]!r} (known: {', '.join(ROLES)})")
    return {"role": role, "content": item[content_key]}
