from __future__ import annotations

import resource
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tune.data.rows import chat_template
from gemma_tune.data.rows.chat_template import ChatRenderer, control_strings
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.errors import DataError
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR

Messages = list[dict[str, str]]


def talk(*contents: str, system: str | None = None) -> Messages:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]


def renderer(template: str) -> ChatRenderer:
    return ChatRenderer(
        template,
        bos_token="<bos>",
        eos_token="<eos>",
        control_strings=["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    )


def text_of(segments: tuple[Segment, ...], *, supervised: bool | None = None) -> str:
    return "".join(segment.text for segment in segments if supervised is None or segment.supervised == supervised)


CONVERSATIONS = [
    talk("Hello", "Hi!"),
    talk("  padded \n", "\n answer\t"),
    talk("One?", "1", "Two?", "2", "Three?", "3"),
    talk("Repeat: answer", "answer", "Repeat: answer", "answer"),
    talk("⟦message 1⟧", "⟦message 0⟧"),
    talk("Ünïcödé 🦊 ẞ", "日本語\n\n\nعربى"),
    talk("", "An answer to nothing"),
    talk("Curly {{ 7 * 7 }} {% if %}", "{# no comment #}"),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_text_is_what_transformers_renders(any_tokenizer: Any, messages: Messages) -> None:
    chat = ChatRenderer.from_tokenizer(any_tokenizer)
    rendered = any_tokenizer.apply_chat_template(messages, tokenize=False)
    asked = any_tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<bos>") and rendered.endswith("\n")
    assert text_of(chat.row(messages, where="here")) == rendered.removeprefix("<bos>").removesuffix("\n")
    assert text_of(chat.prompt(messages[:-1])) == asked.removeprefix("<bos>")


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_every_answer_and_its_turn_end_are_supervised(any_tokenizer: Any, messages: Messages) -> None:
    end = "<turn|>" if "<turn|>" in any_tokenizer.chat_template else "<end_of_turn>"
    segments = ChatRenderer.from_tokenizer(any_tokenizer).row(messages, where="here")
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    assert text_of(segments, supervised=True) == "".join(answer + end for answer in answers)
    # The row's own text is never control text, and the template's text always is.
    own = [segment.text for segment in segments if not segment.control]
    assert own == [content for message in messages if (content := message["content"].strip())]


@given(
    st.lists(
        st.tuples(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip)), min_size=1, max_size=4
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_text_keeps_its_place(gemma3_tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    messages = talk(*(text for turn in turns for text in turn))
    segments = ChatRenderer.from_tokenizer(gemma3_tokenizer).row(messages, where="here")
    assert text_of(segments, supervised=True) == "".join(f"{answer.strip()}<end_of_turn>" for _, answer in turns)
    rendered = gemma3_tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<bos>" + text_of(segments) + "\n" == rendered


def test_the_prompt_of_every_answer_is_what_is_asked(any_tokenizer: Any) -> None:
    chat = ChatRenderer.from_tokenizer(any_tokenizer)
    messages = talk("One?", "1", "Two?", "2")
    asked = text_of(chat.prompt(messages[:-1]))
    assert text_of(chat.row(messages, where="here")).startswith(asked + "2")


def test_system_turn_is_folded_by_gemma_3_and_refused_by_gemma_1(gemma3_tokenizer: Any, tokenizer: Any) -> None:
    messages = talk("Hello", "Hi!", system="Be brief. ")
    segments = ChatRenderer.from_tokenizer(gemma3_tokenizer).row(messages, where="here")
    rendered = gemma3_tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<bos>" + text_of(segments) + "\n" == rendered
    assert Segment("Be brief. ", supervised=False, control=False) in segments
    with pytest.raises(RowError, match=r"rows\.jsonl:3: .*System role not supported"):
        ChatRenderer.from_tokenizer(tokenizer).row(messages, where="rows.jsonl:3")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "no messages"),
        (talk("Hello"), "the last message is from 'user'"),
        (talk("Hello", "Hi!")[1:], "roles must alternate"),
        (talk("Hello", "Hi!") + talk("x", "Again!")[1:], "roles must alternate"),
        (talk("Hello", " \n"), "message 2: the assistant's answer is empty"),
        (talk("Hello", "", "Hello?", "Yes"), "message 2: the assistant's answer is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_their_place(
    tokenizer: Any, messages: Messages, expected: str
) -> None:
    with pytest.raises(RowError, match=expected) as caught:
        ChatRenderer.from_tokenizer(tokenizer).row(messages, where="rows.jsonl:7")
    assert caught.value.message.startswith("rows.jsonl:7: ")


def test_a_model_without_chat_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        ChatRenderer.from_tokenizer(tokenizer)


def test_control_strings_of_a_tokenizer(tokenizer: Any) -> None:
    strings = control_strings(tokenizer)
    assert set(strings) == {
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|turn>",
        "<turn|>",
    }
    assert strings[0] == "<start_of_turn>"


TURNS = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Without a control token behind the answer the model would never stop.
        (TURNS.replace("<end_of_turn>", "") + ASK, "is not a control token"),
        # The answer is trained behind other text than it is asked with.
        (TURNS + ASK.replace("assistant\n", "assistant\nthought\n"), "when it asks for that answer"),
        (TURNS, "when it asks for that answer"),
        (TURNS.replace("m.content", "m.content ~ m.content") + ASK, r"the message of 'user' \(number 1\) twice"),
        (TURNS.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}") + ASK, "not at all"),
        ("{% for m in messages", "line 1"),
        ("{{ messages[0].content.x.y }}", "cannot be rendered"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "cannot be rendered"),
        ("{{ messages.append(1) }}", "cannot be rendered"),
    ],
)
def test_templates_that_cannot_be_trained_with(template: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        renderer(template).row(talk("Hello", "Hi!"), where="here")
    assert not isinstance(caught.value, RowError)


def test_a_template_that_changes_the_text_is_found_row_by_row() -> None:
    chat = renderer(TURNS.replace("m.content", "m.content | replace('secret', '')") + ASK)
    assert text_of(chat.row(talk("Hello", "Hi!"), where="here"), supervised=True) == "Hi!<end_of_turn>"
    with pytest.raises(RowError, match=r"changes the text near .*secret"):
        chat.row(talk("Hello", "A secret word"), where="here")


def sixty(step: str, *, start: str = "'ab'", then: str = "") -> str:
    """A template that computes n.x from itself sixty times."""
    return f"{{% set n = namespace(x={start}) %}}{{% for _ in range(60) %}}{step}{{% endfor %}}{then}"


SLOW = "{% for i in range(99999) %}{{ range(99999)|list|sum }}{% endfor %}"
HOSTILE = {
    # too long
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set x = 'abcdefghij' %}" + "{% for _ in x %}" * 12 + "{% endfor %}" * 12,
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a filter in a loop": SLOW,
    "only for one row": "{% if messages[0].content == 'Hello' %}" + SLOW + "{% endif %}",
    "parts of a text": "{% set s = 'a' * 9999999 %}{% for i in range(99999) %}{{ s[1:] == s }}{% endfor %}",
    "a tree of lists": sixty("{% set n.x = [n.x, n.x] %}", start="[1]", then="{{ n.x }}"),
    "a key of tuples": sixty("{% set n.x = (n.x, n.x) %}", start="(1,)", then="{{ {n.x: 1} }}"),
    "a number that grows": sixty("{% set n.x = n.x * n.x %}", start="9"),
    "many words": "{{ lipsum(n=10**8) }}",
    "a constant": "{{ 9 ** 999999999 }}",
    # too large
    "a product": "{{ 'x' * 10000000000 }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "center": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "indent": r"{{ 'x\nx' | indent(10000000000) }}",
    "json": "{{ [1] | tojson(indent=10000000000) }}",
    "bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "batches": "{{ range(9) | batch(1000000000, 0) | list }}",
    "slices": "{{ range(9) | slice(1000000000) | list | length }}",
    "a text that doubles": sixty("{% set n.x = n.x ~ n.x %}"),
    "replace": sixty("{% set n.x = n.x.replace('a', n.x) %}"),
    "join": sixty("{% set n.x = n.x | join(n.x) %}"),
    "a block that doubles": sixty("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "a list that doubles": sixty("{% set n.x = n.x + n.x %}", start="[1, 2]"),
    "much around little": "{% for _ in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    "some around little": "x" * 70_000,
    # what cannot be compiled or called
    "a macro without end": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many sums": "{{ 1" + "+1" * 50000 + " }}",
    "loops that Python cannot nest": "{% for a in 'a' %}" * 30 + "{% endfor %}" * 30,
    "digits": "{{ " + "9" * 100_000 + " }}",
    "itself": "{% include self %}",
    "two megabytes": "{# " + "x" * 2_000_000 + " #}",
}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_refused_in_time(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(DataError, match=r"^the model's chat template (takes|writes|has|cannot|is wrong)") as caught:
        renderer(TURNS + attack + ASK).row(talk("Hello", "Hi!"), where="here")
    assert len(caught.value.message) < 400
    chat_template._child_for.cache_clear()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    if sys.platform == "linux":  # macOS does not enforce it
        # The largest child of this process so far, which an earlier test may have started.
        assert after.ru_maxrss <= max(before.ru_maxrss, (chat_template.MAX_BYTES + 50e6) / 1024)


def test_a_row_that_is_refused_spoils_no_other_row() -> None:
    chat = renderer("{% if messages[0].content == 'Hello' %}{{ 'x' * 10000000000 }}{% endif %}" + TURNS + ASK)
    for _ in range(2):
        with pytest.raises(DataError, match="takes more than 512 MB of memory"):
            chat.row(talk("Hello", "Hi!"), where="here")
        assert text_of(chat.row(talk("Bye", "Hi!"), where="here"), supervised=True) == "Hi!<end_of_turn>"


def test_many_slow_rows_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    chat = renderer(
        "{% for i in range(99) %}{{ range(29999)|list|sum|string|length * 0 or '' }}{% endfor %}" + TURNS + ASK
    )
    with pytest.raises(DataError, match=r"takes more than 0\.3 seconds of computing"):
        for _ in range(99):
            chat.row(talk("Hello", "Hi!"), where="here")


def test_a_known_template_and_a_changed_one_render_the_same(any_tokenizer: Any) -> None:
    known = ChatRenderer.from_tokenizer(any_tokenizer)
    any_tokenizer.chat_template += "{# mine #}"
    changed = ChatRenderer.from_tokenizer(any_tokenizer)
    assert (known._known is not None, changed._known) == (True, None)
    long = [talk("One? " + "word " * 200_000, "1" * 300_000, "🦊\ud83d", "\u2028 \x00 é")]
    for messages in [*CONVERSATIONS, *long]:
        assert known.row(messages, where="here") == changed.row(messages, where="here")
        assert known.prompt(messages[:-1]) == changed.prompt(messages[:-1])


def test_the_embedded_template_is_known() -> None:
    chat = ChatRenderer.from_tokenizer(load_tokenizer(TINY_MODEL_DIR))
    assert chat._known is not None
    assert f"({TINY_MODEL_DIR / 'chat_template.jinja'})" in chat._name


def test_generation_tags_are_read_as_their_content() -> None:
    marked = TURNS.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}") + ASK
    assert renderer(marked).row(talk("a", "b"), where="here") == renderer(TURNS + ASK).row(talk("a", "b"), where="here")
