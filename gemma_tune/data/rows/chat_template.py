"""The model's own chat template, rendered so that every answer's place is known without searching for it.

A conversation is rendered twice: once with a mark in place of each message, which gives the template's own text around
the messages (the skeleton, the same for all conversations with the same roles), and once as it is, to prove that
skeleton plus messages is what the model's template says, character for character.

A template comes with a model and is code that can take any time and memory, depending on a row: filters, products,
containers in containers, macros. So it is rendered in a process under limits; only short conversations in a template
that is known to be harmless are rendered in this one, which saves the way there and back (some 60 µs a row).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.disk import read_json_object
from gemma_tune.errors import DataError, ModelError
from gemma_tune.identity import text_sha256
from gemma_tune.machine.child import ChildEnd, LimitedChild
from gemma_tune.models.safetensors import chat_template_file, read_chat_template
from gemma_tune.models.token_ids import read_added_tokens
from gemma_tune.text import counted, format_bytes, shorten

MAX_TEMPLATE_CHARS = 1024 * 1024
MAX_RENDERED_CHARS = 16 * 1024 * 1024
MAX_SECONDS = 2  # of computing, for one conversation. 600 messages take 0.01 s in Gemma 3's template and 0.9 s in 4's.
MAX_BYTES = 512_000_000
# SHA-256 of chat templates that have been read, white space around them aside: they are harmless, whatever a row holds.
_HARMLESS = frozenset(
    {
        "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6",  # Gemma 1 and 2, CodeGemma
        "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29",  # Gemma 3
        "3c69d66c91b73b627f50986dc549bdbd5aac93df040d488d126a527ea1014901",  # Gemma 3n
        "33204f1acb5bd0002713e16a593847f24ceeafe711ed88bda2a352dc996a3373",  # Gemma 4, five revisions
        "55572b8d3c8342044e25874c73fe5234b661fa0a57a57f6ef75b58e03d7d959a",
        "781d10940fbc44be40064b5d43a056fc486c84ceaa55538226368b57314132bf",
        "2f1b4d75d067bae3fe44e676721c7f077d243bc007156cb9c2f8b5836613d082",
        "603a42db292c25278e9b23d94c7abbe77453f13e26a053c43c5c2f900b4136f7",
        "6611d0818fc877c21c0de90a8abb4a0e6d13b87fe7c475f9b7b13cb0f728f4e1",  # Gemma 4 12B
        "1d35a24a2a63cc600c0cab43628a6df4cd3318e959b03307cf5f9f7e29ecf783",  # Gemma 4 26B-A4B and 31B
        "df900edd2fcee5defc268bee887666c43c976d973bb3e87355b52423a651bf91",
        "8ce66fc322fefc0f0f613440e5e31768f39b6bed3b3259b69efd8a7e650200f0",  # the embedded Gemma
    }
)
# What a template may write itself around the messages of a conversation.
_MAX_TEXT_CHARS, _MAX_TEXT_CHARS_PER_MESSAGE = 64_000, 1_000
# A row of a harmless template that is rendered in this process has at most so many characters: time may be quadratic.
_MAX_OWN_CHARS = 30_000
_OR = ", or take a plain data template such as dolly"
# White space that str.strip (Jinja's trim) removes and that no template writes itself.
_PAD = "\u2002\u2003"


class ChatTokenizer(Protocol):
    """What is read from a transformers tokenizer."""

    chat_template: Any
    bos_token: Any
    eos_token: Any
    all_special_tokens: Any
    backend_tokenizer: Any


def control_strings(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    """The strings that a tokenizer reads as control tokens (`<bos>`, `<start_of_turn>`, …), longest first."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    strings = {token.content for token in added if token.special} | {
        str(token) for token in tokenizer.all_special_tokens
    }
    return tuple(sorted(strings, key=lambda string: (-len(string), string)))


@dataclass(frozen=True)
class _Skeleton:
    """The template's own text around the messages."""

    literals: tuple[str, ...]  # [num_messages + 1]; literals[i] stands before message i
    strips: tuple[tuple[bool, bool], ...]  # [num_messages]; is white space removed on its left, and on its right?

    def content(self, index: int, text: str) -> str:
        left, right = self.strips[index]
        text = text.lstrip() if left else text
        return text.rstrip() if right else text


class ChatRenderer:
    """Renders conversations with a chat template and knows which part of the text is whose."""

    def __init__(
        self,
        template: str,
        *,
        bos_token: str,
        eos_token: str,
        control_strings: Iterable[str],
        name: str = "the model's chat template",
    ) -> None:
        """Take `template` (Jinja, as in tokenizer_config.json), which is called `name` in messages."""
        self.template = template
        self.sha256 = text_sha256(template)
        self._bos = bos_token
        self._specials: dict[str, str] = {"bos_token": bos_token, "eos_token": eos_token}
        self._control_strings = tuple(sorted(control_strings, key=len, reverse=True))
        self._name = name
        if len(template) > MAX_TEMPLATE_CHARS:
            raise self._fault(f"has {len(template):,} characters, more than {MAX_TEMPLATE_CHARS:,}")
        self._known = compile_template(template) if text_sha256(template.strip()) in _HARMLESS else None
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton | str] = {}
        self._checked: dict[tuple[str, ...], str | None] = {}

    @classmethod
    def from_tokenizer(cls, tokenizer: ChatTokenizer) -> ChatRenderer:
        """The renderer for a tokenizer's own chat template.

        Raises:
            DataError: the tokenizer has no chat template (base models have none), or several without a default.
        """
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise DataError(
                "this model has no chat template, so chat rows cannot be rendered",
                hint="take an -it model, or a plain data template such as dolly, alpaca or completion",
            )
        path = Path(str(getattr(tokenizer, "name_or_path", "")))
        file = path if path.is_file() else chat_template_file(path)  # a GGUF file holds its own
        return cls(
            str(template),
            name=f"the model's chat template ({file})" if file else "the model's chat template",
            bos_token=str(tokenizer.bos_token or ""),
            eos_token=str(tokenizer.eos_token or ""),
            control_strings=control_strings(tokenizer),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> ChatRenderer | None:
        """The same for a model directory, without transformers; None where it has no tokenizer.json or no template.

        Raises a ModelError where a file cannot be read.
        """
        path, template = directory / "tokenizer.json", read_chat_template(directory)
        if not template or not path.is_file():
            return None
        config = read_json_object(directory / "tokenizer_config.json", error=ModelError)
        tokens = [config.get(name) or "" for name in ("bos_token", "eos_token")]
        bos_token, eos_token = (str(token["content"] if isinstance(token, dict) else token) for token in tokens)
        return cls(
            template,
            name=f"the model's chat template ({chat_template_file(directory)})",
            bos_token=bos_token,
            eos_token=eos_token,
            control_strings=[token["content"] for token in read_added_tokens(path) if token.get("special")],
        )

    def _fault(self, fault: str, *, hint: str | None = None) -> DataError:
        return DataError(f"{self._name} {fault}", hint=hint or "take another model" + _OR)

    @functools.cached_property
    def has_system_turn(self) -> bool:
        """Whether the template renders a system turn; those of Gemma 1 and 2 refuse it."""
        try:
            return bool(self._skeleton(("system", "user"), generation=True, where=""))
        except (RowError, DataError):
            return False

    def fold_system(self, messages: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
        """Put a system turn in front of the first user message, as Gemma 3's template does, where it has no place."""
        if [message["role"] for message in messages[:2]] != ["system", "user"] or self.has_system_turn:
            return messages
        system, first, *others = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content'].strip()}"}, *others]

    def row(self, messages: Sequence[Mapping[str, str]], *, where: str) -> tuple[Segment, ...]:
        """The segments of a conversation that ends with an answer; every assistant turn and its stop token supervised.

        The template's `<bos>` and what it writes behind the last stop token are left out.

        Raises:
            RowError: the template refuses the conversation, or changes a message's text.
            DataError: the template cannot be used for training at all.
        """
        roles = tuple(message["role"] for message in messages)
        if not roles or roles[-1] != "assistant":
            raise RowError(
                where,
                f"the last message is from {roles[-1]!r}: there is no answer to learn" if roles else "no messages",
            )
        skeleton = self._skeleton(roles, generation=False, where=where)
        self._check_prefixes(roles, skeleton, where=where)
        contents = [skeleton.content(index, message["content"]) for index, message in enumerate(messages)]
        self._check_rendering(messages, skeleton, contents, where=where)
        literals = self._without_bos(skeleton)
        segments: list[Segment] = []
        for index, role in enumerate(roles):
            literal = literals[index]
            if index and roles[index - 1] == "assistant":
                stop = self._turn_end(literal)
                segments.append(Segment(stop, supervised=True, control=True))
                literal = literal[len(stop) :]
            if literal:
                segments.append(Segment(literal, supervised=False, control=True))
            answer = role == "assistant"
            if answer and not contents[index].strip():
                raise RowError(where, f"message {index + 1}: the assistant's answer is empty")
            if contents[index]:
                segments.append(Segment(contents[index], supervised=answer, control=False))
        segments.append(Segment(self._turn_end(skeleton.literals[-1]), supervised=True, control=True))
        return tuple(segments)

    def prompt(self, messages: Sequence[Mapping[str, str]], *, where: str = "the conversation") -> tuple[Segment, ...]:
        """The segments of a conversation up to where the model answers; nothing is supervised.

        Raises:
            RowError: the template refuses the conversation.
            DataError: the template cannot be rendered.
        """
        roles = tuple(message["role"] for message in messages)
        skeleton = self._skeleton(roles, generation=True, where=where)
        segments: list[Segment] = []
        for index, literal in enumerate(self._without_bos(skeleton)):
            if literal:
                segments.append(Segment(literal, supervised=False, control=True))
            if index < len(messages):
                content = skeleton.content(index, messages[index]["content"])
                if content:
                    segments.append(Segment(content, supervised=False, control=False))
        return tuple(segments)

    def _without_bos(self, skeleton: _Skeleton) -> list[str]:
        return [skeleton.literals[0].removeprefix(self._bos), *skeleton.literals[1:]]

    def _turn_end(self, literal: str) -> str:
        """The control token at the start of what the template writes behind an answer."""
        for string in self._control_strings:
            if literal.startswith(string):
                return string
        raise self._fault(
            f"ends an answer with {literal[:40]!r}, which is not a control token: the model would never learn to stop"
        )

    def _skeleton(self, roles: tuple[str, ...], *, generation: bool, where: str) -> _Skeleton:
        key = (roles, generation)
        if key not in self._skeletons:
            try:
                self._skeletons[key] = self._make_skeleton(roles, generation=generation)
            except _Refused as refused:
                self._skeletons[key] = str(refused)
        found = self._skeletons[key]
        if isinstance(found, str):
            raise RowError(where, f"the model's chat template refuses it: {found}")
        return found

    def _make_skeleton(self, roles: tuple[str, ...], *, generation: bool) -> _Skeleton:
        # The marks stand in a text of our own making, in which they cannot occur otherwise.
        marks = [f"⟦message {index}⟧" for index in range(len(roles))]
        messages = [{"role": role, "content": _PAD + mark + _PAD} for role, mark in zip(roles, marks, strict=True)]
        rest = self._render(messages, generation=generation)
        if len(rest) > _MAX_TEXT_CHARS + _MAX_TEXT_CHARS_PER_MESSAGE * len(messages):
            raise self._fault(f"writes {len(rest):,} characters around {counted(len(messages), 'message')}")
        literals: list[str] = []
        strips: list[tuple[bool, bool]] = []
        for index, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                fault = "twice" if found else "not at all, or not in order"
                raise self._fault(
                    f"writes the message of {role!r} (number {index + 1}) {fault}",
                    hint="take a plain data template such as dolly, or rows without that role",
                )
            strips.append((not before.endswith(_PAD), not rest.startswith(_PAD)))
            literals.append(before.removesuffix(_PAD))
            rest = rest.removeprefix(_PAD)
        literals.append(rest)
        return _Skeleton(literals=tuple(literals), strips=tuple(strips))

    def _check_prefixes(self, roles: tuple[str, ...], skeleton: _Skeleton, *, where: str) -> None:
        """Each answer is trained behind exactly the text that the template writes when the model is asked for it."""
        if roles not in self._checked:
            self._checked[roles] = None
            for index in (index for index, role in enumerate(roles) if role == "assistant"):
                asked = self._skeleton(roles[:index], generation=True, where=where) if index else None
                if asked and asked.literals != skeleton.literals[: index + 1]:
                    trained, told = (
                        shorten(repr(text), num_chars=200) for text in (skeleton.literals[index], asked.literals[-1])
                    )
                    self._checked[roles] = (
                        f"writes {trained} before answer {index + 1} of a conversation, but {told} when it asks for "
                        "that answer"
                    )
                    break
        fault = self._checked[roles]
        if fault:
            raise self._fault(fault, hint="take a plain data template such as dolly: training would not match use")

    def _check_rendering(
        self, messages: Sequence[Mapping[str, str]], skeleton: _Skeleton, contents: Sequence[str], *, where: str
    ) -> None:
        parts = [part for pair in zip(skeleton.literals, contents, strict=False) for part in pair]
        expected = "".join([*parts, skeleton.literals[-1]])
        try:
            rendered = self._render(messages, generation=False)
        except _Refused as refused:
            raise RowError(where, f"the model's chat template refuses it: {refused}") from None
        if rendered != expected:
            at = next(at for at, (one, two) in enumerate(zip_longest(rendered, expected)) if one != two)
            raise RowError(
                where, f"the model's chat template changes the text near {expected[max(0, at - 20) : at + 20]!r}"
            )

    def _render(self, messages: Sequence[Mapping[str, str]], *, generation: bool) -> str:
        if self._known and len(repr(messages)) <= _MAX_OWN_CHARS:
            try:
                return render_template(self._known, messages, self._specials, generation=generation)
            except DataError as error:
                raise self._fault(error.message, hint=error.hint) from None
        end = _child_for(self.template).call(messages=messages, specials=self._specials, generation=generation)
        if not end.has_result:
            raise self._fault(_told(end), hint=end.hint or "restore the chat template of the model's publisher" + _OR)
        if "refused" in end.result:
            raise _Refused(end.result["refused"])
        return str(end.result["text"])


# --- rendering, in a process of its own where the template is not known ----------------------------------------------


@functools.lru_cache(maxsize=4)
def _child_for(template: str) -> LimitedChild:
    """One process a template; several models may be compared."""
    return LimitedChild(
        f"{__name__}:open_template", {"template": template}, cpu_seconds=MAX_SECONDS, memory_bytes=MAX_BYTES
    )


def _told(end: ChildEnd) -> str:
    """Say why there is no rendering, behind the template's name."""
    if end.is_ours:
        return str(end.error)
    said = f"{end.error or ''}\n{end.log}"
    if end.signal == "SIGPROF" or (end.code, end.signal, end.error) == (None, None, None):
        return f"takes more than {MAX_SECONDS} seconds of computing to render a conversation"
    if "MemoryError" in said or end.signal == "SIGKILL":
        return f"takes more than {format_bytes(MAX_BYTES)} of memory to render a conversation"
    return f"cannot be rendered: {end.error or end.signal or said.strip()[-200:]}"


def open_template(template: str) -> Callable[..., dict[str, str]]:
    """Return what renders conversations with a template, for a `LimitedChild`; as `compile_template`."""
    compiled = compile_template(template)

    def render(messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], generation: bool) -> dict[str, str]:
        try:
            return {"text": render_template(compiled, messages, specials, generation=generation)}
        except _Refused as refused:
            return {"refused": str(refused)}

    return render


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template; raises a DataError that goes on behind its name, as `render_template` does."""
    environment = ImmutableSandboxedEnvironment(
        # The options are those that transformers renders chat templates with.
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"is wrong in line {error.lineno}: {shorten(str(error.message), num_chars=200)}") from None
    except (SyntaxError, RecursionError, ValueError) as error:  # of the Python that Jinja makes of it
        raise DataError(f"cannot be compiled: {shorten(str(error), num_chars=200)}") from None


def render_template(
    compiled: jinja2.Template, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], *, generation: bool
) -> str:
    """Render a conversation; `generation` asks for the answer.

    Raises:
        _Refused: the template refuses it.
        DataError: the template fails, or writes more than MAX_RENDERED_CHARS.
    """
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation}
    rendered: list[str] = []
    length = 0
    try:
        for part in compiled.generate(variables | dict(specials)):
            length += len(part)
            if length > MAX_RENDERED_CHARS:
                raise DataError(f"writes more than {MAX_RENDERED_CHARS:,} characters for one row")
            rendered.append(part)
    except (DataError, MemoryError, _Refused):
        raise
    except Exception as error:  # whatever the code in a template raises
        raise DataError(f"cannot be rendered: {shorten(str(error), num_chars=200)}") from None
    return "".join(rendered)


class _Refused(Exception):
    """The template called raise_exception; the text is what it said."""


def _raise_exception(message: object) -> None:
    raise _Refused(shorten(str(message), num_chars=500))


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks answers in some templates; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a mutable class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' tojson: plain JSON, without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
