"""The model's own chat template, rendered so that every answer's place is known without searching for it.

A conversation is rendered twice: once with a mark in place of each message, which gives the template's own text around
the messages (the skeleton, the same for all conversations with the same roles), and once as it is, to prove that
skeleton plus messages is what the model's template says, character for character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.errors import DataError
from gemma_tune.identity import text_sha256

# What one rendering may do. Measured: 200 messages take 601 steps in Gemma 1's template, 1,001 in 3's and 22,703 in
# 4's, whose inner loops look back at earlier turns.
MAX_STEPS = 200_000
MAX_RENDERED_CHARS = 16 * 1024 * 1024
# White space that str.strip (Jinja's trim) removes and that no template writes itself.
_PAD = "\u2002\u2003"
# What the code in a template may raise.
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


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

    def __init__(self, template: str, *, bos_token: str, eos_token: str, control_strings: Iterable[str]) -> None:
        """Compile `template` (Jinja, as in tokenizer_config.json); raises a DataError where it does not compile."""
        self.template = template
        self.sha256 = text_sha256(template)
        self._bos = bos_token
        self._specials: dict[str, str] = {"bos_token": bos_token, "eos_token": eos_token}
        self._control_strings = tuple(sorted(control_strings, key=len, reverse=True))
        self._environment = _ChatEnvironment()
        try:
            self._compiled = self._environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the model's chat template, line {error.lineno}: {error.message}") from None
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
        return cls(
            str(template),
            bos_token=str(tokenizer.bos_token or ""),
            eos_token=str(tokenizer.eos_token or ""),
            control_strings=control_strings(tokenizer),
        )

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
        raise DataError(
            f"the model's chat template ends an answer with {literal[:40]!r}, which is not a control token: "
            "the model would never learn to stop",
            hint="take a plain data template such as dolly, or another model",
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
        literals: list[str] = []
        strips: list[tuple[bool, bool]] = []
        for index, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                fault = "twice" if found else "not at all, or not in order"
                raise DataError(
                    f"the model's chat template writes the message of {role!r} (number {index + 1}) {fault}",
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
                    self._checked[roles] = (
                        f"the model's chat template writes {skeleton.literals[index]!r} before answer {index + 1} of a "
                        f"conversation, but {asked.literals[-1]!r} when it asks for that answer"
                    )
                    break
        fault = self._checked[roles]
        if fault:
            raise DataError(fault, hint="take a plain data template such as dolly: training would not match use")

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
        self._environment.steps_left = MAX_STEPS
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation}
        rendered: list[str] = []
        length = 0
        try:
            for part in self._compiled.generate(variables | self._specials):
                self._environment.take_step()
                length += len(part)
                if length > MAX_RENDERED_CHARS:
                    raise DataError(
                        f"the model's chat template writes more than {MAX_RENDERED_CHARS:,} characters for one row"
                    )
                rendered.append(part)
        except _FAULTS as error:
            raise DataError(f"the model's chat template cannot be rendered: {error}") from error
        return "".join(rendered)


class _Refused(Exception):
    """The template called raise_exception; the text is what it said."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks answers in some templates; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a mutable class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that also counts: every turn of a loop and every call takes a step, and texts cannot grow without end.

    A chat template comes with a model and is code: without a count it could run for ever or fill the memory (Jinja's
    sandbox bounds `range`, not nested loops, macros that call themselves twice, or a text that doubles).
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        # The options are those that transformers renders chat templates with. Not optimized: that computes constant
        # expressions when compiling, uncounted.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], optimized=False
        )
        self.steps_left = 0
        self.concat = _join  # type: ignore[method-assign]
        self.globals["raise_exception"] = _raise_exception
        self.filters |= {
            "counted_steps": self._counted,
            "concatenated": _join,
            "join": _join,
            "replace": _replace,
            "tojson": _to_json,
        }
        for widening in ("center", "format", "indent", "wordwrap"):
            del self.filters[widening]

    def take_step(self) -> None:
        """Count one step; raises a DataError after MAX_STEPS of them."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise DataError(f"the model's chat template takes more than {MAX_STEPS:,} steps for one row")

    def _counted(self, items: Iterable[object]) -> Iterator[object]:
        for item in items:
            self.take_step()
            yield item

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return cast(nodes.Template, _Counting().visit(tree))

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.take_step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = __obj.__name__
            if name in ("center", "expandtabs", "ljust", "rjust", "zfill"):
                raise SecurityError(f"str.{name} is not allowed")
            if name == "replace":
                return _replace(owner, *args, **kwargs)
            if name == "join":
                return partial(_join, separator=owner)(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return _join((left, right))
        if operator == "+" and isinstance(left, list | tuple) and len(left) + len(right) > MAX_STEPS:
            raise SecurityError(f"a list of more than {MAX_STEPS:,} items is not allowed")
        if operator == "**" or (operator != "+" and not (isinstance(left, int) and isinstance(right, int))):
            raise SecurityError(f"{operator} on {type(left).__name__} is not allowed")
        self.take_step()
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not allowed")
        return None


class _Counting(NodeTransformer):
    """Sends every loop and every `~` through a filter that counts."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = nodes.Filter(node.iter, "counted_steps", [], [], None, None)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "concatenated", [], [], None, None)


def _bounded(num_chars: int) -> None:
    if num_chars > MAX_RENDERED_CHARS:
        raise SecurityError(f"a text of more than {MAX_RENDERED_CHARS:,} characters is not allowed")


def _join(items: Iterable[object], separator: str = "") -> str:
    texts = [str(item) for item in items]
    _bounded(sum(map(len, texts)) + len(texts) * len(separator))
    return separator.join(texts)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _bounded(len(text) + found * len(new))
    return text.replace(old, new, count)


def _to_json(value: object, indent: int | None = None) -> str:
    """As transformers' tojson: plain JSON, without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
