"""Translates a training template to Ollama's, so that it asks a GGUF with exactly the prompt of training.

Ollama's templates are Go's text/template. Of a request they see the system text, the questions and the answers, and no
other field: what a data template prints besides one question is translated only where it is empty or constant.
Everything else is refused with its name. A translation is kept only when its token ids equal those of training.

How Ollama fills a template (template/template.go of github.com/ollama/ollama): one that reads .Messages is executed
once with all of them; any other is executed once an exchange with .System, .Prompt and .Response, and for the last one
it is cut behind .Response. The BOS is added when the text is tokenized (tokenizer.ggml.add_bos_token), so a template
must hold none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jinja2
from jinja2 import nodes

from gemma_tune.data.encode.encoder import Encoder, FastTokenizer
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.jinja_text import render_text
from gemma_tune.data.rows.render import render_prompt
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.data.rows.template import DataTemplate
from gemma_tune.errors import ExportError

_LAST_QUESTION = (
    '{{ $question := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $question = .Content }}{{ end }}{{ end }}'
)
# Stands for a question while a template is taken apart; the white space is of a kind that no template writes, and shows
# whether it is removed.
_PAD = "\u2002"
_MARK = "⟦Question⟧"
_PROOF_QUESTIONS = ("Which of these are noble gases: neon, sodium, argon?", 'Zwei "Zeilen"\n\n  für 日本 🦊 {{ x }}')
_PROOF_ANSWER = "Neon and argon."
_PROOF_SYSTEM = "Answer in one sentence."
_HINT = (
    "export the merged model for vLLM or transformers, which take its own template, or train with dolly, alpaca, "
    "completion or chat"
)


@dataclass(frozen=True)
class PromptShape:
    """The text around a question and its answer, and whether the questions of a conversation follow one another."""

    single: bool  # trained on single questions: only the last one of a conversation is asked
    before_question: str  # before_question, after_question: around every question; the answer comes behind the latter
    after_question: str
    after_answer: str = ""  # between an answer and the next `before_question`
    # before and behind a system text; the two stand in the place of the first `before_question`. None where the
    # training template has no place for a system text.
    around_system: tuple[str, str] | None = None
    system: str = ""  # the system text of training; empty where there was none
    strips_questions: bool = False  # white space around a question was removed in training, which Ollama does not do

    def render(self, questions: Sequence[str], answers: Sequence[str], *, system: str = "") -> str:
        """The text that Ollama makes of a conversation; one answer fewer than there are questions."""
        if self.single:
            return self.before_question + questions[-1] + self.after_question
        parts = []
        for index, question in enumerate(questions):
            if index:
                parts += [answers[index - 1], self.after_answer]
            if index == 0 and system and self.around_system:
                parts += [self.around_system[0], system, self.around_system[1]]
            else:
                parts.append(self.before_question)
            parts += [question, self.after_question]
        return "".join(parts)

    def to_go(self) -> str:
        """The Go template."""
        before, after = _go_text(self.before_question), _go_text(self.after_question)
        if self.single:
            return _LAST_QUESTION + before + "{{ $question }}" + after + "{{ .Response }}"
        start = before
        if self.around_system is not None:
            opening, closing = map(_go_text, self.around_system)
            if opening == before:  # Gemma 3's turns: the system text stands in the question's own turn
                start = before + "{{ if .System }}{{ .System }}" + closing + "{{ end }}"
            else:
                start = "{{ if .System }}" + opening + "{{ .System }}" + closing + "{{ else }}" + before + "{{ end }}"
        return start + "{{ .Prompt }}" + after + "{{ .Response }}" + _go_text(self.after_answer)


def describe_shape(shape: PromptShape, template: DataTemplate) -> tuple[str, ...]:
    """What is different from asking through gemma-tune, a sentence each."""
    notes = []
    if shape.single:
        notes.append("trained on single questions: each one is answered without those before it.")
    elif template.messages:
        notes.append("trained on single questions: a conversation is in the model's own turns, and was not trained.")
    if shape.around_system is None:
        notes.append("the training template has no place for a system text: Ollama leaves one out.")
    if not template.conversation:
        notes += _how_to_give_optional(template)
    if shape.strips_questions:
        notes.append("training removed white space around a question; Ollama keeps it, so give none.")
    notes.append("Ollama reads control tokens in a question, such as <end_of_turn>, as such; gemma-tune does not.")
    return tuple(notes)


# --- from a training template to its shape ----------------------------------------------------------------------------


def translate_template(template: DataTemplate, *, tokenizer: FastTokenizer) -> PromptShape:
    """The shape of a training template, proven: its token ids are those of training for sample conversations.

    Raises:
        ExportError: something of the template has no counterpart in Ollama; the message names it.
        DataError: a chat data template with a tokenizer that has no chat template.
    """
    encoder = Encoder(tokenizer)
    chat = ChatRenderer.from_tokenizer(tokenizer) if template.needs_chat else None
    shape = _text_shape(template) if chat is None else _turns_shape(template, chat, encoder)
    texts = (shape.before_question, shape.after_question, shape.after_answer, *(shape.around_system or ()))
    if any(str(tokenizer.bos_token) in text for text in texts):
        raise _refused(template, f"it writes {tokenizer.bos_token} itself, and Ollama adds one: there would be two")
    for question in _PROOF_QUESTIONS:
        row: dict[str, object] = (
            {template.conversation[0]: _messages([question], [])}
            if template.conversation
            else {_question_field(template): question}
        )
        expected = render_prompt(template, row, chat=chat)
        _require_same_ids(shape.render([question], [], system=shape.system), expected, template, encoder)
    return shape


def _refused(template: DataTemplate, what: str) -> ExportError:
    return ExportError(f"the data template {template.name} cannot be written for Ollama: {what}", hint=_HINT)


def _text_shape(template: DataTemplate) -> PromptShape:
    before, after, strips = _around_question(template)
    return PromptShape(single=True, before_question=before, after_question=after, strips_questions=strips)


def _turns_shape(template: DataTemplate, chat: ChatRenderer, encoder: Encoder) -> PromptShape:
    """The model's own turns, and inside of them what the data template writes around a question."""
    turns = _chat_turns(template, chat)
    _prove_turns(turns, template, chat, encoder)
    if template.conversation:
        return turns
    roles = [message.role for message in template.messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise _refused(template, f"its messages are {', '.join(roles)}; one question and one answer can be translated")
    before, after, strips = _around_question(template)
    opening = turns.around_system
    return replace(
        turns,
        before_question=turns.before_question + before,
        after_question=after + turns.after_question,
        around_system=(opening[0], opening[1] + before) if opening else None,
        system=_constant_system(template) if roles[0] == "system" else "",
        strips_questions=strips,
    )


def _chat_turns(template: DataTemplate, chat: ChatRenderer) -> PromptShape:
    """The turns of a model's chat template, read off what it writes around one and around two questions."""

    def literals(*roles: str) -> list[str]:
        found = [""]
        for segment in chat.prompt([{"role": role, "content": _MARK} for role in roles]):
            if segment.control:
                found[-1] += segment.text
            else:
                found.append("")
        return found

    before, after = literals("user")
    between = literals("user", "assistant", "user")[2]
    if not between.endswith(before):
        raise _refused(
            template, f"the model's chat template opens a later question with {between!r} and the first with {before!r}"
        )
    try:
        opening, closing, _ = literals("system", "user")
        around_system = (opening, closing)
    except RowError:  # refused by the chat template, as Gemma 1's and 2's do
        around_system = None
    padded = chat.prompt([{"role": "user", "content": f" {_MARK} "}])
    return PromptShape(
        single=False,
        before_question=before,
        after_question=after,
        after_answer=between.removesuffix(before),
        around_system=around_system,
        strips_questions=any(segment.text == _MARK for segment in padded),
    )


def _prompts(template: DataTemplate) -> tuple[str, ...]:
    """The Jinja of a prompt; the last piece is the user's."""
    return tuple(message.content for message in template.messages[:-1]) or (template.prompt,)


def _question_field(template: DataTemplate) -> str:
    """The one field that Ollama fills; every other field that the prompt reads must be optional."""
    read = [name for name in template.fields if any(name in _names(source) for source in _prompts(template))]
    question = template.question or (read[0] if len(read) == 1 else None)
    if question not in read:
        told = ", ".join(read) or "no field at all"
        raise _refused(template, f"its prompt reads {told}, and no `question:` says which of them the user types")
    unfilled = [name for name in read if name != question and name not in template.optional]
    if unfilled:
        raise _refused(template, f"Ollama has no place for the required field {', '.join(unfilled)}")
    return question


def _constant_system(template: DataTemplate) -> str:
    source = _prompts(template)[0]
    if _question_field(template) in _names(source):
        raise _refused(template, "its system message prints the question")
    system = render_text(source, _empty_fields(template)).strip()
    if not system:
        raise _refused(template, "its system message is empty for a bare question")
    return system


def _around_question(template: DataTemplate) -> tuple[str, str, bool]:
    """What stands before and behind the question while optional fields are empty; whether the question is stripped."""
    question, source = _question_field(template), _prompts(template)[-1]
    tree = jinja2.Environment().parse(source)
    printed = [value for node in tree.body if isinstance(node, nodes.Output) for value in node.nodes]
    if _names(source).count(question) != 1 or not any(_prints(value, question) for value in printed):
        raise _refused(
            template, f"it does not print {question} once, unconditionally and unchanged, as {{{{ {question} }}}}"
        )
    values = _empty_fields(template) | {question: f"{_PAD}{_MARK}{_PAD}"}
    before, _, after = render_text(source, values).partition(_MARK)
    strips = not before.endswith(_PAD)
    before, after = before.removesuffix(_PAD), after.removeprefix(_PAD)
    if template.messages:  # a message is stripped when a row is rendered
        before, after = before.lstrip(), after.rstrip()
        strips = strips or not (before and after)
    return before, after, strips


def _names(source: str) -> list[str]:
    """Every field that a piece of Jinja reads, as often as it does."""
    return [node.name for node in jinja2.Environment().parse(source).find_all(nodes.Name)]


def _prints(node: nodes.Node, field: str) -> bool:
    if isinstance(node, nodes.Filter) and node.name == "trim" and not node.args and node.node is not None:
        node = node.node
    return isinstance(node, nodes.Name) and node.name == field


def _empty_fields(template: DataTemplate) -> dict[str, str]:
    return dict.fromkeys(template.fields, "")


def _how_to_give_optional(template: DataTemplate) -> list[str]:
    """Ollama has one field: what a user types so that the prompt is that of a row with its optional fields filled."""
    question, source = _question_field(template), _prompts(template)[-1]
    optional = [name for name in template.optional if name in _names(source) and name != question]
    if not optional:
        return []
    before, after, _ = _around_question(template)
    filled = render_text(source, _empty_fields(template) | {name: name.upper() for name in (question, *optional)})
    filled = filled.strip() if template.messages else filled
    told = f"Ollama has no field for {', '.join(optional)}"
    if not (filled.startswith(before) and filled.endswith(after)):
        return [f"{told}: it is always empty."]
    return [f"{told}: to give it, write a prompt as {filled.removeprefix(before).removesuffix(after)!r}."]


# --- the proof --------------------------------------------------------------------------------------------------------


def _prove_turns(turns: PromptShape, template: DataTemplate, chat: ChatRenderer, encoder: Encoder) -> None:
    """One to three questions, with and without a system text."""
    one, other = _PROOF_QUESTIONS
    for questions in ((one,), (one, other), (other, one, one)):
        answers = [_PROOF_ANSWER] * (len(questions) - 1)
        for system in [""] if turns.around_system is None else ["", _PROOF_SYSTEM]:
            expected = chat.prompt(_messages(questions, answers, system=system))
            _require_same_ids(turns.render(questions, answers, system=system), expected, template, encoder)


def _require_same_ids(text: str, expected: Sequence[Segment], template: DataTemplate, encoder: Encoder) -> None:
    """Compare a text that Ollama makes, in which control tokens are read, with what the model was trained on."""
    if encoder.encode_prompt([Segment(text, supervised=False, control=True)]) != encoder.encode_prompt(expected):
        raise _refused(template, f"its translation {text!r} does not have the token ids of training")


def _messages(questions: Sequence[str], answers: Sequence[str], *, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    for index, question in enumerate(questions):
        if index:
            turns.append({"role": "assistant", "content": answers[index - 1]})
        turns.append({"role": "user", "content": question})
    return turns


# --- quoting ----------------------------------------------------------------------------------------------------------

# What cannot stand as it is: a Modelfile ends a value at three quotes and drops characters that do not print (its
# parser asks Go's strconv.IsPrint; tabs and line breaks are kept); Go reads {{ as an action, also where one { is text.
_SPECIAL = r'\{+|"{3,}'


def _go_text(text: str) -> str:
    """Text of a Go template inside of a Modelfile's quotes; what cannot stand there is written as a Go string."""
    dropped = {re.escape(char) for char in text if not _is_kept(char)}
    pattern = "|".join([_SPECIAL, *dropped])
    return re.sub(pattern, lambda found: '{{ "' + "".join(map(_go_char, found[0])) + '" }}', text)


def _is_kept(char: str) -> bool:
    return char.isprintable() or char in "\n\t"


def _go_char(char: str) -> str:
    return char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}"


def plain_value(text: str, *, what: str) -> str:
    """Return a value of a Modelfile between triple quotes, in which nothing can be escaped.

    Raises:
        ExportError: it cannot be written so; `what` it is, in words.
    """
    if '"""' in text or not all(map(_is_kept, text)):
        raise ExportError(
            f"{what} holds three quotes or a character that does not print, which no Modelfile can hold",
            hint="export the merged model for vLLM or transformers instead",
        )
    return text
