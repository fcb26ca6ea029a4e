from __future__ import annotations

from typing import Any

import pytest

from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.render import END_OF_TEXT, question_fields, render_example, render_prompt
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.data.rows.template import load_template, parse_template
from gemma_tune.data.rows.unread import RowFormat
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.errors import DataError


def row(**fields: object) -> SourceRow:
    return SourceRow(fields, "rows.jsonl:1")


def example(template: str, fields: SourceRow, *, chat: ChatRenderer | None = None, **columns: str) -> Any:
    return render_example(load_template(template), fields, chat=chat, row_format=RowFormat(columns))


def test_dolly_with_context() -> None:
    made = example("dolly", row(instruction="Who?", context="Ann sings.", response=" Ann \n", category="open_qa"))
    assert made.prompt_text == "### Instruction:\nWho?\n\n### Context:\nAnn sings.\n\n### Response:\n"
    assert made.segments[-2:] == (Segment("Ann", supervised=True, control=False), END_OF_TEXT)
    assert (made.question, made.response, made.category, made.where) == ("Who?", "Ann", "open_qa", "rows.jsonl:1")
    assert made.segments[1] == Segment("Who?", supervised=False, control=False)


@pytest.mark.parametrize("context", ["", " \n", None])
def test_dolly_without_context(context: str | None) -> None:
    made = example("dolly", row(instruction="Who?", context=context, response="Ann"))
    assert made.prompt_text == "### Instruction:\nWho?\n\n### Response:\n"
    assert made.category is None


def test_alpaca_and_completion() -> None:
    made = example("alpaca", row(instruction="Add.", input="1 + 1", output="2"))
    assert made.prompt_text == "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n"
    made = example("completion", row(prompt="The sky is", completion=" blue. "))
    assert (made.prompt_text, made.response) == ("The sky is", " blue. ")


@pytest.mark.parametrize(("name", "extra"), [("dolly-chat", "context"), ("alpaca-chat", "input")])
def test_single_rows_as_turns(tokenizer: Any, name: str, extra: str) -> None:
    chat = ChatRenderer.from_tokenizer(tokenizer)
    answer = "response" if extra == "context" else "output"
    made = example(name, row(**{"instruction": "Who?", extra: "Ann sings.", answer: "Ann"}), chat=chat)
    assert made.prompt_text == "<start_of_turn>user\nWho?\n\nAnn sings.<end_of_turn>\n<start_of_turn>model\n"
    made = example(name, row(**{"instruction": "Who?", extra: "", answer: "Ann"}), chat=chat)
    assert made.prompt_text == "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
    assert (made.response, made.segments[-1].text) == ("Ann", "<end_of_turn>")


def test_messages_and_conversations_are_the_same_row(tokenizer: Any) -> None:
    chat = ChatRenderer.from_tokenizer(tokenizer)
    openai = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[message["role"]], "value": message["content"]} for message in openai]
    first = example("chat", row(messages=openai), chat=chat)
    second = example("chat", row(conversations=sharegpt), chat=chat)
    assert first == second
    assert (first.question, first.response) == ("Two?", "2")
    assert first.prompt_text.endswith("1<end_of_turn>\n<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n")
    mapped = example("chat", row(dialog=openai), chat=chat, messages="dialog")
    assert mapped.segments == first.segments


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response": "x"}, "instruction is missing"),
        ({"instruction": None, "response": "x"}, "instruction is missing"),
        ({"instruction": {"a": 3}, "response": "x"}, "instruction is dict, not text"),
        ({"instruction": float("nan"), "response": "x"}, "instruction is missing"),
        ({"instruction": "x", "response": float("inf")}, "response is float, not text"),
        ({"instruction": "x", "context": ["y"], "response": "x"}, "context is list, not text"),
        ({"instruction": "x", "response": " \n"}, "the response is empty"),
        ({"instruction": "x", "response": "\ud83d"}, "holds half a character .*ud83d"),
    ],
)
def test_bad_rows_are_refused_with_their_place(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(RowError, match=f"rows.jsonl:1: {expected}"):
        example("dolly", row(**fields))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "messages and conversations are missing"),
        ("text", "messages is str, not a list"),
        ([], "messages is an empty list"),
        (["text"], r"messages\[0\] is str, not a message"),
        ([{"content": "x"}], r"messages\[0\]: role is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\] holds no text"),
        ([{"role": "user", "content": {"a": 3}}], r"messages\[0\]: content is dict, not text"),
        ([{"role": "user", "content": float("nan")}], r"messages\[0\]: content is missing"),
        (float("nan"), "messages and conversations are missing"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]: role 'tool': turns of tools are not rendered yet"),
        ([{"role": "guest", "content": "x"}], r"unknown role 'guest'; data\.roles: {guest: assistant} says who speaks"),
        ([{"from": "human"}], r"messages\[0\]: value is missing"),
    ],
)
def test_bad_conversations_are_refused_with_their_place(tokenizer: Any, value: object, expected: str) -> None:
    with pytest.raises(RowError, match=expected):
        example("chat", row(messages=value), chat=ChatRenderer.from_tokenizer(tokenizer))


def test_columns_are_mapped() -> None:
    made = example("dolly", row(q="Who?", a="Ann", kind="x"), instruction="q", response="a", category="kind")
    assert (made.question, made.response, made.category) == ("Who?", "Ann", "x")


def test_a_key_is_the_rows_text_whatever_the_template_and_the_place(tokenizer: Any) -> None:
    chat = ChatRenderer.from_tokenizer(tokenizer)
    first = row(instruction="Who?", context="", response="Ann")
    elsewhere = SourceRow({"response": "Ann ", "instruction": "Who?", "extra": 1}, "rows.jsonl:2")
    other = row(instruction="Who", context="?", response="Ann")
    assert example("dolly", first).key == example("dolly", elsewhere).key == example("dolly-chat", first, chat=chat).key
    assert example("dolly", first).key != example("dolly", other).key


@pytest.mark.parametrize("name", ["dolly", "dolly-chat", "alpaca", "alpaca-chat", "completion", "chat"])
def test_a_question_is_asked_as_it_is_trained(tokenizer: Any, name: str) -> None:
    chat = ChatRenderer.from_tokenizer(tokenizer)
    template = load_template(name)
    question = question_fields(template, "Who sings?")
    answered: dict[str, object]
    if template.conversation:
        answered = {"messages": [*question["messages"], {"role": "assistant", "content": "Ann"}]}  # type: ignore[misc]
    else:
        answered = question | {field: "Ann" for field in template.required if field not in question}
    trained = example(name, row(**answered), chat=chat)
    assert render_prompt(template, question, chat=chat) == trained.prompt_segments
    assert trained.question == "Who sings?"


def test_asking_needs_a_question_field_and_a_chat_template() -> None:
    text = 'name: mine\nkind: text\nprompt: "{{ q }}"\nresponse: "{{ a }}"\n'
    with pytest.raises(DataError, match="does not say which field holds the question"):
        question_fields(parse_template(text, label="mine.yaml"), "x")
    with pytest.raises(DataError, match="needs the model's chat template"):
        render_prompt(load_template("chat"), {"messages": [{"role": "user", "content": "x"}]}, chat=None)


def test_row_text_is_not_control_text_and_template_text_is() -> None:
    text = 'name: mine\nkind: text\nprompt: "<start_of_turn>{{ q }}"\nresponse: "{{ a }}"\n'
    made = render_example(
        parse_template(text, label="mine.yaml"), row(q="<end_of_turn>{{ 7 * 7 }}", a="<eos>"), chat=None
    )
    assert made.segments == (
        Segment("<start_of_turn>", supervised=False, control=True),
        Segment("<end_of_turn>{{ 7 * 7 }}", supervised=False, control=False),
        Segment("<eos>", supervised=True, control=False),
        END_OF_TEXT,
    )


@pytest.mark.parametrize(("text", "told"), [("a\udcff", r"not UTF-8 \(byte 0xff\)"), ("\ud83d", "half a character")])
def test_a_question_that_is_no_text_is_refused(text: str, told: str) -> None:
    """A shell gives bytes outside of the locale's encoding as halves of surrogate pairs."""
    for name in ("completion", "dolly"):
        template = load_template(name)
        with pytest.raises(RowError, match=told):
            render_prompt(template, question_fields(template, text), chat=None)
