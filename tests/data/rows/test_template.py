from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.rows import jinja_text
from gemma_tune.data.rows.jinja_text import render_pieces, render_text
from gemma_tune.data.rows.template import MAX_TEMPLATE_BYTES, list_templates, load_template, parse_template
from gemma_tune.errors import DataError

TEXT = 'name: mine\nkind: text\nprompt: "{{ question }}"\nresponse: "{{ answer }}"\n'


def test_shipped_templates_load_and_describe_themselves() -> None:
    assert list_templates() == [
        "alpaca",
        "alpaca-chat",
        "chat",
        "chat-completion",
        "completion",
        "dolly",
        "dolly-chat",
        "preference",
        "text",
    ]
    for name in list_templates():
        template = load_template(name)
        assert template.name == name
        assert template.about and template.example
        assert template.conversation or template.question in template.fields


def test_dolly_names_its_fields() -> None:
    template = load_template("dolly")
    assert (template.kind, template.required, template.optional) == ("text", ("instruction", "response"), ("context",))
    assert (template.question, template.category) == ("instruction", "category")


@pytest.mark.parametrize("name", list_templates())
def test_a_template_travels_with_a_run(tmp_path: Path, name: str) -> None:
    template = load_template(name)
    copy = tmp_path / "template.yaml"
    copy.write_text(template.source_text, encoding="utf-8")
    assert load_template(copy) == template
    assert load_template(str(copy)).sha256 == template.sha256


def test_unknown_template_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'dolly'") as caught:
        load_template("doly")
    assert caught.value.hint is not None and "alpaca" in caught.value.hint
    with pytest.raises(DataError, match="no such data template"):
        load_template("nowhere/mine.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt: [", "mine.yaml:1:10: not YAML"),
        ("just text", "not a data template"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("name: a\nname: b\n", "mine.yaml:2: 'name' is given twice"),
        ("name: !!python/object/apply:os.system [id]\n", "mine.yaml:1: tags"),
        (TEXT + "respone: x\n", "respone: unknown key; did you mean 'response'"),
        (TEXT.replace("text", "tekst"), "kind: must be one of"),
        (TEXT + "optional: [context]\n", "the field 'context' is declared but"),
        (TEXT + "question: quest\n", "the field 'quest' is declared but"),
        (TEXT + "conversation: [messages]\n", "no `conversation`"),
        ("name: mine\nkind: text\nprompt: x\n", "has `prompt` and `response`"),
        ("name: mine\nkind: chat\n", "either `messages` or `conversation`"),
        (
            "name: mine\nkind: chat\nmessages:\n  - {role: user, content: x}\n",
            "the last message must be the assistant's",
        ),
        ("name: mine\nkind: chat\nmessages:\n  - {role: model, content: x}\n", "messages.0.role: must be one of"),
        ("name: mine\nkind: chat\nconversation: [messages]\nquestion: x\n", "no meaning beside"),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_template(text, label="mine.yaml")
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ question }", "prompt, line 1"),
        ("a\n{% if question %}", "prompt, line 2"),
        ("{% for x in question %}{% for y in question %}{{ x }}{% endfor %}{% endfor %}", "For is not allowed"),
        ("{% set x = question %}{{ x }}", "Assign is not allowed"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "Macro is not allowed"),
        ("{{ range(1000000000) }}", "Call is not allowed"),
        ("{{ question.__class__.__mro__ }}", "Getattr is not allowed"),
        ("{{ question['__class__'] }}", "Getitem is not allowed"),
        ("{{ 'x' * 1000000000 }}", "Mul is not allowed"),
        ("{{ 9 ** 9 ** 9 }}", "Pow is not allowed"),
        ("{{ question | attr('x') }}", "the filter attr is not allowed"),
        ("{{ question | center(1000000000) }}", "the filter center is not allowed"),
        ("{% include 'x' %}", "Include is not allowed"),
        ("{{ '\ue0f0' }}", "private-use"),
        # Nested so deep that Jinja or Python fail to compile it, or take minutes; or too much of it.
        ("{{ " + "(" * 3000 + "question" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ question" + "|upper" * 300 + " }}", "more than 60 inside one another"),
        ("{% if question %}" * 70 + "{% endif %}" * 70, "more than 60 inside one another"),
        ("{{ question and " + "question and " * 3000 + "1 }}", "more than 60 inside one another"),
        ("{{ question }}x" * 3000, "more than 5,000 expressions"),
        ("{{ question == " + "9" * 5000 + " }}", "a number that is too large"),
        # What fails for every row is found before one is read.
        ("{{ question > 1 }}", "prompt: the data template cannot be rendered: '>' not supported"),
        ("{{ question | title(1) }}", "cannot be rendered: do_title() takes 1"),
        ("{% if question is string(1) %}x{% endif %}", "cannot be rendered: test_string() takes 1"),
    ],
)
def test_jinja_that_could_do_harm_is_refused(source: str, expected: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        parse_template(_yaml(source), label="mine.yaml")
    assert expected in caught.value.message
    assert time.process_time() - started < 2


def test_jinja_as_large_as_it_may_be_is_compiled_soon() -> None:
    started = time.process_time()
    nested = "{{ question" + "|upper" * 55 + " }}"
    assert parse_template(_yaml(nested + "{{ question }} and " * 1500), label="mine.yaml").fields
    assert time.process_time() - started < 4


def _yaml(prompt: str) -> str:
    block = "\n".join(f"  {line}" for line in prompt.split("\n"))
    return f"name: mine\nkind: text\nprompt: |\n{block}\nresponse: '{{{{ answer }}}}'\n"


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT + "# " + "x" * MAX_TEMPLATE_BYTES, encoding="utf-8")
    with pytest.raises(DataError, match="which no data template is"):
        load_template(path)


def test_a_huge_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_text, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(DataError, match="longer than 1,000 characters"):
        render_text("{{ a }}{{ a }}", {"a": "x" * 600})


def test_wrong_encoding_of_a_template_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(TEXT.encode() + b"about: caf\xe9\n")
    with pytest.raises(DataError, match=r"mine\.yaml:5: not UTF-8 \(byte 0xe9\)"):
        load_template(path)


def test_row_text_is_never_compiled() -> None:
    assert render_text("{{ a }}", {"a": "{{ 7 * 7 }}{% for x in y %}"}) == "{{ 7 * 7 }}{% for x in y %}"


@given(st.text(), st.text())
def test_the_templates_own_text_is_told_from_values(first: str, second: str) -> None:
    pieces = render_pieces("A {{ a }}\nB {{ b }}", {"a": first, "b": second})
    assert [text for text, from_row in pieces if not from_row] == ["A ", "\nB "]
    assert [text for text, from_row in pieces if from_row] == [text for text in (first, second) if text]
    assert "".join(text for text, _ in pieces) == f"A {first}\nB {second}"


@given(st.text(alphabet="\ue0f0\ue0f1\ue0f2012ab"))
def test_the_marks_themselves_may_stand_in_a_row(text: str) -> None:
    assert render_text("{{ a }}", {"a": text}) == text
