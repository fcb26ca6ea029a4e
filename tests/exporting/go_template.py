"""What Ollama does with our Modelfiles: its parser, Go's text/template, and its two ways to fill one.

Written from Go's documentation of text/template and Ollama's of the Modelfile; `test_go_template.py` holds what real Go
printed for the same templates. Anything outside of the subset raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r'\{\{ (?P<code>(?:"(?:\\.|[^"\\])*"|[^"}]|\}(?!\}))*?) \}\}', re.DOTALL)


@dataclass
class Node:
    """`code` is an action, or None for text; `body` and `otherwise` belong to range and if."""

    code: str | None
    text: str = ""
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def parse(template: str) -> list[Node]:
    root: list[Node] = []
    stack: list[tuple[Node, list[Node]]] = []
    into, at = root, 0
    for found in [*_ACTION.finditer(template), None]:
        text = template[at : found.start() if found else None]
        assert "{{" not in text and not (found and text.endswith("{")), f"Go reads an action in {text!r}"
        if text:
            into.append(Node(None, text))
        if found is None:
            break
        at, code = found.end(), found["code"]
        if code == "end":
            _, into = stack.pop()
        elif code == "else":
            into = stack[-1][0].otherwise
        else:
            node = Node(code)
            into.append(node)
            if code.startswith(("if ", "range ")):
                stack.append((node, into))
                into = node.body
    assert not stack, "unclosed if or range"
    return root


def execute(nodes: list[Node], dot: dict[str, Any], variables: dict[str, Any] | None = None) -> str:
    variables = {} if variables is None else variables
    printed = []
    for node in nodes:
        if node.code is None:
            printed.append(node.text)
        elif node.code.startswith("range "):
            for item in _value(node.code.removeprefix("range "), dot, variables):
                printed.append(execute(node.body, item, variables))
        elif node.code.startswith("if "):
            chosen = node.body if _value(node.code.removeprefix("if "), dot, variables) else node.otherwise
            printed.append(execute(chosen, dot, variables))
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.+)", node.code, re.DOTALL):
            variables[assigned[1]] = _value(assigned[2], dot, variables)
        else:
            printed.append(str(_value(node.code, dot, variables)))
    return "".join(printed)


def _value(code: str, dot: dict[str, Any], variables: dict[str, Any]) -> Any:
    if compared := re.fullmatch(r"eq (\S+) (\S+)", code):
        return _value(compared[1], dot, variables) == _value(compared[2], dot, variables)
    if re.fullmatch(r"\.\w+", code):
        return dot[code[1:]]
    if re.fullmatch(r"\$\w+", code):
        return variables[code]
    assert re.fullmatch(r'"(\\U[0-9a-f]{8}|[^"\\\n])*"', code), f"not in the subset: {code}"
    return re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), code[1:-1])


def render_for_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """The text that Ollama makes of a conversation that ends with a question."""
    nodes = parse(template)
    if ".Messages" in template:
        listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
        return execute(nodes, {"System": _joined_system(messages), "Messages": listed, "Response": ""})
    printed = []
    values = {"System": "", "Prompt": "", "Response": ""}
    for message in messages:
        role, content = message["role"], message["content"]
        ends = {"system": values["Prompt"] or values["Response"], "user": values["Response"], "assistant": ""}[role]
        if ends:
            printed.append(execute(nodes, values))
            values = {"System": "", "Prompt": "", "Response": ""}
        values[{"system": "System", "user": "Prompt", "assistant": "Response"}[role]] = content
    codes = [node.code for node in nodes]
    last = nodes[: codes.index(".Response") + 1] if ".Response" in codes else nodes
    return "".join([*printed, execute(last, values)])


def _joined_system(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(message["content"] for message in messages if message["role"] == "system")


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, value) pairs; a parameter is (PARAMETER name, value). Values in quotes may span lines."""
    commands = []
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = line.lstrip().partition(" ")
        if name.upper() == "PARAMETER":
            key, _, value = value.lstrip().partition(" ")
            name = f"PARAMETER {key}"
        value = value.lstrip()
        quote = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        while quote and not (len(value.rstrip()) >= 2 * len(quote) and value.rstrip().endswith(quote)):
            value += "\n" + next(lines)
        value = value.rstrip()
        value = value[len(quote) : len(value) - len(quote)]
        # Ollama's parser keeps what Go calls printable, spaces and line breaks, and drops the rest without a word.
        kept = "".join(char for char in value if char.isprintable() or char in "\n\r\t")
        commands.append((name if name.startswith("PARAMETER") else name.upper(), kept))
    return commands
