"""From a row and a data template to segments, for training and for asking; the kinds of template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.jinja_text import render_pieces, render_text
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.data.rows.unread import AS_THEY_STAND, RowFormat, Tally, Unread
from gemma_tune.data.sources.cells import CONTENT_KEYS, ROLE_KEYS, read_cells
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.errors import DataError
from gemma_tune.members import Members
from gemma_tune.recipe.methods import RowKind

if TYPE_CHECKING:
    from gemma_tune.data.rows.template import DataTemplate, MessageTemplate

# The names under which the three roles are known, in lower case: OpenAI's messages, ShareGPT's conversations, Gemma's
# own turns, OpenAssistant's trees, LLaMA-Factory's tags. `data.roles` names further ones.
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "ai", "bot", "chatbot", "chatgpt", "output"), "assistant"),
}
_TOOL_ROLES = frozenset({"tool", "function", "function_call", "function_response", "observation", "ipython"})
# The names of a message's keys; the first one that it has is read.
_TEXT_PARTS = (None, "text", "input_text", "output_text")
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
    template: DataTemplate,
    row: SourceRow,
    *,
    chat: ChatRenderer | None,
    row_format: RowFormat = AS_THEY_STAND,
    tally: Tally | None = None,
) -> Example:
    """Render one row for training. `chat` is for chat templates; what the template does not read is counted in `tally`.

    Raises:
        RowError: the row lacks a field, a field is not text, the answer is empty, something would be cut, or the chat
            template refuses the row.
        DataError: a chat template without `chat`.
    """
    reader = _Row(template, row.fields, chat, row.where, row_format)
    try:
        return template.facts.render(reader)
    finally:
        if tally is not None:
            tally.add(reader.unread)


def render_prompt(
    template: DataTemplate, fields: Mapping[str, object], *, chat: ChatRenderer | None
) -> tuple[Segment, ...]:
    """The segments that ask the model for an answer, exactly as they stand before it in training.

    `fields` holds what the template's prompt reads, such as `{"instruction": …, "context": …}`, or the list of messages
    of a conversation; the response is not needed. See `question_fields` for a single question.

    Raises:
        RowError, DataError: as `render_example`.
    """
    row = _Row(template, fields, chat, "the question", AS_THEY_STAND)
    if not template.needs_chat:
        segments = row.text_prompt(row.values(answered=False))
    elif template.conversation:
        segments = row.rendered(row.conversation(), row.renderer.prompt)
    else:
        messages = row.turns(template.messages[:-1], row.values(answered=False))
        segments = row.rendered(messages, row.renderer.prompt)
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


def prepare_fields(
    template: DataTemplate, fields: Mapping[str, object], columns: Mapping[str, str]
) -> tuple[Mapping[str, object], list[str]]:
    """Make text and messages of what a row holds where the template reads them; see `read_cells`."""
    messages = {columns.get(name, name) for name in (*template.conversation, *template.answers, *template.opening)}
    texts = {columns.get(name, name) for name in (*template.fields, template.category) if name}
    return read_cells(fields, texts=texts, messages=messages)


class _Row:
    """A row, and what it is rendered with."""

    def __init__(
        self,
        template: DataTemplate,
        fields: Mapping[str, object],
        chat: ChatRenderer | None,
        where: str,
        row_format: RowFormat,
    ) -> None:
        self.template, self.chat, self.where, self._format = template, chat, where, row_format
        self.unread = Unread(row_format.drop_fields)
        columns = row_format.columns
        self._opening = [name for name in template.opening if name in columns or name not in columns.values()]
        names = (*template.conversation, *template.fields, *self._opening, template.category)
        fields, _ = prepare_fields(template, fields, columns)
        self.fields = self.unread.keep(fields, {self.column(name) for name in names if name})
        present = [name for name in template.conversation if self.fields.get(self.column(name)) is not None]
        for name in present[1:]:
            self.unread.unused[self.column(name)] = None

    def column(self, name: str) -> str:
        return self._format.columns.get(name, name)

    @property
    def renderer(self) -> ChatRenderer:
        if self.chat is None:
            raise DataError(
                "a chat data template needs the model's chat template", hint="take a plain data template such as dolly"
            )
        return self.chat

    def values(self, *, answered: bool = True) -> dict[str, str]:
        """The template's fields as text. Not `answered`: a missing field is empty, as the response is not there yet."""
        self.unread.check(self.where)
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

    def opening(self) -> list[dict[str, str]]:
        """The turns before the row's own: its `system`, and the pairs or messages of its `history`."""
        turns = []
        for name in self._opening:
            column = self.column(name)
            value = self.fields.get(column)
            if name == "system" and isinstance(value, str):
                turns += [{"role": "system", "content": value}] if value.strip() else []
            elif name == "history" and isinstance(value, list):
                for index, item in enumerate(value):
                    is_pair = isinstance(item, list) and len(item) == 2
                    if is_pair:
                        item = [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
                    turns += self.messages(item, f"{column}[{index}]")
            elif value is not None:
                raise RowError(self.where, f"{column} is {type(value).__name__}, not {_OPENING_FORMS[name]}")
        return turns

    def turns(self, templates: Sequence[MessageTemplate], values: Mapping[str, str]) -> list[dict[str, str]]:
        """The row's opening, and the messages of a template that reads single fields."""
        return self.opening() + [
            {"role": message.role, "content": render_text(message.content, values).strip()} for message in templates
        ]

    def conversation(self) -> list[dict[str, str]]:
        """The row's opening, and the messages of the first conversation column that it has."""
        names = [self.column(name) for name in self.template.conversation]
        column = next((name for name in names if self.fields.get(name) is not None), None)
        if column is None:
            self.unread.check(self.where)
            raise RowError(self.where, f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing")
        value = self.fields[column]
        if isinstance(value, str) and value.strip() and self.template.answers:
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else type(value).__name__
            raise RowError(self.where, f"{column} is {found}, not a list of messages")
        opening, messages = self.opening(), self.messages(value, column)
        if opening[:1] == messages[:1]:
            opening = opening[1:]  # the same system turn in both places
        return opening + messages

    def answers(self, column: str) -> list[dict[str, str]]:
        """The messages of a column that holds an answer: text, a message, or a list of messages."""
        value = self.fields.get(column)
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        return self.messages(value or None, column)

    def messages(self, value: object, column: str) -> list[dict[str, str]]:
        """One message or a list of them as role and content. What they lose is checked by the caller."""
        read = []
        items = value if isinstance(value, list) else [value]
        ends_in_answer = column in map(self.column, self.template.answers) or not self.template.answers
        for index, item in enumerate(items):
            place = f"{column}[{index}]" if items is value else column
            message = self._message(item, place, is_answer=ends_in_answer and index == len(items) - 1)
            if message["role"] == "system" and "system" in self.unread.drop_fields:
                self.unread.dropped.add("system")
            else:
                read.append(message)
        return read

    def _message(self, item: object, place: str, *, is_answer: bool) -> dict[str, str]:
        if not isinstance(item, Mapping):
            raise RowError(self.where, f"{place} is {type(item).__name__}, not a message with role and content")
        role_key = next((key for key in ROLE_KEYS if key in item), "role")
        content_key = next((key for key in CONTENT_KEYS if key in item), "value" if role_key == "from" else "content")
        fields = self.unread.keep(item, (role_key, content_key), at=place)
        name, content = fields.get(role_key), fields.get(content_key)
        if not isinstance(name, str):
            raise self._no_text(f"{place}: {role_key}", name)
        lowered = name.strip().lower()
        role = self._format.roles.get(lowered) or ROLES.get(lowered)
        if role is None and lowered in _TOOL_ROLES:
            reason = "turns of tools are not rendered yet, and without them the conversation is another one"
            self.unread.lost.clear()  # nothing that is dropped would make the row usable
            raise RowError(self.where, f"{place}: {role_key} {name!r}: {reason}")
        if role is None:
            self.unread.roles[name] = "assistant" if is_answer else "user"
        self.unread.is_developer |= lowered == "developer" and role == "system"
        if isinstance(content, list):
            content = self._joined(content, place, between=" " if role == "system" else "")
        if content is None and self.unread.lost:
            content = ""  # the row is refused for what stands there instead
        if not isinstance(content, str):
            raise self._no_text(f"{place}: {content_key}", content)
        return {"role": role or name, "content": content}

    def _joined(self, parts: Sequence[object], place: str, *, between: str) -> str:
        """The text of a list of content parts, joined as the chat templates of Gemma 3 and 4 do."""
        texts = []
        for index, part in enumerate(parts):
            at = f"{place}.content[{index}]"
            if isinstance(part, str):
                texts.append(part.strip())
            elif isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
                texts.append(str(self.unread.keep(part, ("type", "text"), at=at).get("text", "")).strip())
            elif isinstance(part, Mapping) and part.get("type") not in _TEXT_PARTS:
                self.unread.lose(str(part["type"]), at)
            else:
                raise RowError(self.where, f"{at} holds no text")
        return between.join(texts)

    def _no_text(self, place: str, value: object) -> RowError:
        found = "is missing" if value is None else f"is {type(value).__name__}, not text"
        return RowError(self.where, f"{place} {found}")

    def text_prompt(self, values: Mapping[str, str]) -> tuple[Segment, ...]:
        """The prompt of a text template, behind the row's `system` where it has one."""
        system = "".join(turn["content"] for turn in self.opening())
        pieces = render_pieces(self.template.system, {"system": system}) if system else []
        pieces = [*pieces, *render_pieces(self.template.prompt, values)]
        return tuple(Segment(text, supervised=False, control=not from_row) for text, from_row in pieces)

    def rendered(
        self,
        messages: Sequence[dict[str, str]],
        render: Callable[..., tuple[Segment, ...]],
        *,
        where: str | None = None,
    ) -> tuple[Segment, ...]:
        """Render messages of which nothing is cut; a system turn that the model has no place for joins the next."""
        where = where or self.where
        self.unread.check(where)
        folded = self.renderer.fold_system(messages)
        self.unread.is_folded |= folded is not messages
        return render(folded, where=where)

    def answer(self, messages: Sequence[dict[str, str]], key_parts: Iterable[tuple[str, str]] | None = None) -> Example:
        """Render messages, the last of which is the answer."""
        segments = self.rendered(messages, self.renderer.row)
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


_OPENING_FORMS = {"system": "text", "history": "a list of [question, answer]"}


def _field_key(row: _Row, values: Mapping[str, str]) -> list[tuple[str, str]]:
    return [*sorted(values.items()), *((turn["role"], turn["content"]) for turn in row.opening())]


def _render_text(row: _Row) -> Example:
    values = row.values()
    response = render_text(row.template.response, values)
    response = response.strip() if row.template.strip_response else response
    if not response.strip():
        raise RowError(row.where, "the response is empty")
    segments = (*row.text_prompt(values), Segment(response, supervised=True, control=False), END_OF_TEXT)
    return row.example(segments, values.get(row.template.question or "", ""), response, _field_key(row, values))


def _render_chat(row: _Row) -> Example:
    if not row.template.conversation:
        values = row.values()
        return row.answer(row.turns(row.template.messages, values), _field_key(row, values))
    messages = row.conversation()
    if not row.template.answer:
        return row.answer(messages)
    made = row.answer([*messages, *row.answers(row.column(row.template.answer))])
    # The answers in the prompt are given, not learned: two segments each, the text and its stop token.
    num_given = 2 * sum(message["role"] == "assistant" for message in messages)
    given = [index for index, segment in enumerate(made.segments) if segment.supervised][:num_given]
    segments = list(made.segments)
    for index in given:
        segments[index] = replace(segments[index], supervised=False)
    return replace(made, segments=tuple(segments))


def _render_preference(row: _Row) -> Example:
    """The conversation with its chosen answer; the rejected one is rendered as well, so that its faults are told.

    An answer is text, a message, or a list of messages: the last one of it counts, and without a conversation column
    those before it are the conversation.
    """
    names = [row.column(name) for name in row.template.conversation]
    prompt = row.conversation() if any(row.fields.get(name) is not None for name in names) else None
    answered = []
    for side in row.template.answers:
        column = row.column(side)
        messages = row.answers(column)
        if not messages:
            raise RowError(row.where, f"{column} holds no answer")
        if prompt is None and len(messages) < 2:
            raise RowError(
                row.where, f"{' and '.join(names)} are missing, and {column} holds no question before its answer"
            )
        conversation = [*([*row.opening(), *messages[:-1]] if prompt is None else prompt), messages[-1]]
        row.rendered(conversation, row.renderer.row, where=f"{row.where}: {side}")
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
    keys: tuple[frozenset[str], ...]  # which of a file's keys stand together (`system` aside)
    shape: str  # the same in words
    needs_chat: bool = True  # whether rows are rendered with the model's chat template
    answers: tuple[str, ...] = ()  # columns that hold whole answers; they may bring the conversation before them along


_TEXT, _MESSAGES, _CONVERSATION = map(frozenset, ({"prompt", "response"}, {"messages"}, {"conversation"}))
_ANSWERED = _CONVERSATION | {"answer"}
TEMPLATE_KINDS = Members(
    "kind of data template",
    (
        # Prompt and response joined as plain text, which ends with the tokenizer's eos.
        TemplateKind("text", "response", _render_text, (_TEXT,), "`prompt` and `response`", needs_chat=False),
        # Messages in the model's own chat template, which end with its turn end.
        TemplateKind(
            "chat",
            "response",
            _render_chat,
            (_MESSAGES, _CONVERSATION, _ANSWERED),
            "either `messages` or `conversation`",
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
    """JSON can spell half of a surrogate pair (`"\\ud83d"`), which is no character and cannot be tokenized.

    So can a shell: what it gave that is not of the locale's encoding is such a half (PEP 383).
    """
    for segment in segments:
        try:
            segment.text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(segment.text[error.start])
            what = (
                f"half a character (\\u{half:04x})"
                if half < 0xDC80
                else f"what is not UTF-8 (byte 0x{half & 0xFF:02x})"
            )
            raise RowError(where, f"holds {what}") from None


def _key(parts: Iterable[tuple[str, str]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, text in parts:
        stripped = text.strip()
        digest.update(f"{name}:{len(stripped)}:{stripped};".encode(errors="surrogatepass"))
    return digest.digest()
