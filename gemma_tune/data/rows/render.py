"""From a row and a data template to segments, for training and for asking; the kinds of template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.jinja_text import render_pieces, render_text
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.errors import DataError
from gemma_tune.members import Members
from gemma_tune.recipe.methods import RowKind

if TYPE_CHECKING:
    from gemma_tune.data.rows.template import DataTemplate, MessageTemplate

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
    return template.facts.render(_Row(template, row.fields, columns, chat, row.where))


def render_prompt(
    template: DataTemplate, fields: Mapping[str, object], *, chat: ChatRenderer | None
) -> tuple[Segment, ...]:
    """The segments that ask the model for an answer, exactly as they stand before it in training.

    `fields` holds what the template's prompt reads, such as `{"instruction": …, "context": …}`, or the list of messages
    of a conversation; the response is not needed. See `question_fields` for a single question.

    Raises:
        RowError, DataError: as `render_example`.
    """
    row = _Row(template, fields, {}, chat, "the question")
    if not template.needs_chat:
        return _text_prompt(template, row.values(answered=False))
    if template.conversation:
        messages = row.conversation()
    else:
        messages = _messages(template.messages[:-1], row.values(answered=False))
    segments = row.renderer.prompt(messages, where=row.where)
    _check_encodable(segments, where=row.where)
    return segments


def question_fields(template: DataTemplate, question: str) -> dict[str, object]:
    """Make the fields of a row that asks `question` and nothing else.

    Raises a DataError where the template does not say which of its fields a question goes to.
    """
    if template.conversation:
        return {template.conversation[0]: [{"role": "user", "content": question}]}
    if template.question is None:
        raise DataError(
            f"the data template {template.name} does not say which field holds the question",
            hint=f"add `question: FIELD` to it, one of: {', '.join(template.fields)}",
        )
    return {template.question: question}


@dataclass(frozen=True)
class _Row:
    """A row, and what it is rendered with."""

    template: DataTemplate
    fields: Mapping[str, object]
    columns: Mapping[str, str]  # template field → column of the row
    chat: ChatRenderer | None
    where: str

    def column(self, name: str) -> str:
        return self.columns.get(name, name)

    @property
    def renderer(self) -> ChatRenderer:
        if self.chat is None:
            raise DataError(
                "a chat data template needs the model's chat template", hint="take a plain data template such as dolly"
            )
        return self.chat

    def values(self, *, answered: bool = True) -> dict[str, str]:
        """The template's fields as text. Not `answered`: a missing field is empty, as the response is not there yet."""
        values: dict[str, str] = {}
        for name in self.template.fields:
            value = self.fields.get(self.column(name))
            if value is None and (not answered or name in self.template.optional):
                value = ""
            if not isinstance(value, str):
                found = "is missing" if value is None else f"is {type(value).__name__}, not text"
                raise RowError(self.where, f"{name} {found}")
            values[name] = value
        return values

    def conversation(self) -> list[dict[str, str]]:
        """The messages of the first conversation column that the row has."""
        names = [self.column(name) for name in self.template.conversation]
        column = next((name for name in names if self.fields.get(name) is not None), None)
        if column is None:
            raise RowError(self.where, f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing")
        value = self.fields[column]
        if isinstance(value, str) and value.strip() and self.template.facts.answers:
            return [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else type(value).__name__
            raise RowError(self.where, f"{column} is {found}, not a list of messages")
        return [_message(item, where=f"{column}[{index}]", row=self.where) for index, item in enumerate(value)]

    def answer(self, messages: Sequence[dict[str, str]], key_parts: Iterable[tuple[str, str]] | None = None) -> Example:
        """Render messages, the last of which is the answer."""
        segments = self.renderer.row(messages, where=self.where)
        question = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        if key_parts is None:
            key_parts = [(message["role"], message["content"]) for message in messages]
        # The renderer has checked that the last message is an answer; its text is the last but one segment.
        return self.example(segments, question, segments[-2].text, key_parts)

    def example(
        self, segments: tuple[Segment, ...], question: str, response: str, key_parts: Iterable[tuple[str, str]]
    ) -> Example:
        """`key_parts`: the names and texts that decide the key."""
        _check_encodable(segments, where=self.where)
        category = self.fields.get(self.column(self.template.category)) if self.template.category else None
        if not isinstance(category, str) or not category:
            category = None
        return Example(self.where, segments, question, response, category, _key(key_parts))


def _render_text(row: _Row) -> Example:
    values = row.values()
    response = render_text(row.template.response, values)
    response = response.strip() if row.template.strip_response else response
    if not response.strip():
        raise RowError(row.where, "the response is empty")
    segments = (*_text_prompt(row.template, values), Segment(response, supervised=True, control=False), END_OF_TEXT)
    return row.example(segments, values.get(row.template.question or "", ""), response, sorted(values.items()))


def _render_chat(row: _Row) -> Example:
    if row.template.conversation:
        return row.answer(row.conversation())
    values = row.values()
    return row.answer(_messages(row.template.messages, values), sorted(values.items()))


def _render_preference(row: _Row) -> Example:
    """The conversation with its chosen answer; the rejected one is rendered as well, so that its faults are told.

    An answer is text, a message, or a list of messages: the last one of it counts, and without a conversation column
    those before it are the conversation.
    """
    names = [row.column(name) for name in row.template.conversation]
    prompt = row.conversation() if any(row.fields.get(name) is not None for name in names) else None
    answered = []
    for side in row.template.facts.answers:
        column = row.column(side)
        value = row.fields.get(column)
        if isinstance(value, str):
            messages = [{"role": "assistant", "content": value}]
        else:
            items = value if isinstance(value, list) else [value]
            messages = [_message(item, where=column, row=row.where) for item in items]
        if prompt is None and len(messages) < 2:
            raise RowError(
                row.where, f"{' and '.join(names)} are missing, and {column} holds no question before its answer"
            )
        conversation = [*(messages[:-1] if prompt is None else prompt), messages[-1]]
        row.renderer.row(conversation, where=f"{row.where}: {side}")
        answered.append(conversation)
    if answered[0] == answered[1]:
        raise RowError(row.where, "chosen and rejected are the same")
    if answered[0][:-1] != answered[1][:-1]:
        raise RowError(row.where, "chosen and rejected answer different conversations")
    return row.answer(answered[0])


@dataclass(frozen=True)
class TemplateKind:
    """What a kind of template decides."""

    name: str
    rows: RowKind  # what a row of it holds, as training methods call it
    render: Callable[[_Row], Example]
    keys: tuple[frozenset[str], ...]  # which of prompt, response, messages and conversation a file has together
    shape: str  # the same in words
    needs_chat: bool = True  # whether rows are rendered with the model's chat template
    answers: tuple[str, ...] = ()  # columns that hold whole answers; they may bring the conversation before them along


_TEXT, _MESSAGES, _CONVERSATION = map(frozenset, ({"prompt", "response"}, {"messages"}, {"conversation"}))
TEMPLATE_KINDS = Members(
    "kind of data template",
    (
        # Prompt and response joined as plain text, which ends with the tokenizer's eos.
        TemplateKind("text", "response", _render_text, (_TEXT,), "`prompt` and `response`", needs_chat=False),
        # Messages in the model's own chat template, which end with its turn end.
        TemplateKind(
            "chat", "response", _render_chat, (_MESSAGES, _CONVERSATION), "either `messages` or `conversation`"
        ),
        # A conversation with a chosen and a rejected answer, both in chat turns.
        TemplateKind(
            "preference",
            "pair",
            _render_preference,
            (_CONVERSATION,),
            "`conversation` (with chosen and rejected)",
            answers=("chosen", "rejected"),
        ),
    ),
)


def _check_encodable(segments: tuple[Segment, ...], *, where: str) -> None:
    """JSON can spell half of a surrogate pair (`"\\ud83d"`), which is no character and cannot be tokenized."""
    for segment in segments:
        try:
            segment.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(where, f"holds half a character (\\u{ord(segment.text[error.start]):04x})") from None


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
