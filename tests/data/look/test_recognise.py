"""What `init` takes columns for, by what they hold and how they are called."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping

import pytest

from gemma_tune.data.look.columns import describe_columns
from gemma_tune.data.look.recognise import GOALS, Goal, Undecided, recognise
from gemma_tune.data.rows.template import list_templates, load_template
from gemma_tune.errors import DataError


def text(index: int) -> str:
    return f"a text of some length, which is number {index} of them"


def settle(names: tuple[str, ...], goal: Goal | None, mapped: Mapping[str, str] | None = None) -> tuple[Goal, str]:
    def value(name: str, index: int) -> object:
        turns = [{"role": "user", "content": text(index)}, {"role": "assistant", "content": text(index)}]
        return turns if name in ("messages", "conversations") else text(index)

    columns = describe_columns([{name: value(name, index) for name in names} for index in range(8)])
    found = recognise("rows", columns, goal=goal, mapped=mapped or {}, command="gemma-tune init rows")
    return found.goal, found.template


@pytest.mark.parametrize(
    ("columns", "goal", "template"),
    [
        (("instruction", "context", "response", "category"), "instruct", "dolly"),
        (("instruction", "input", "output"), "instruct", "alpaca"),
        (("messages",), "chat", "chat"),
        (("conversations", "id"), "chat", "chat"),
        (("text",), "complete", "text"),
        (("prompt", "completion"), "complete", "completion"),
        (("Question", "ANSWER"), "instruct", "dolly"),
    ],
)
def test_columns_decide_the_goal(columns: tuple[str, ...], goal: Goal, template: str) -> None:
    assert settle(columns, None) == (goal, template)


def test_a_goal_takes_only_templates_that_serve_it() -> None:
    dolly = ("instruction", "context", "response")
    assert settle(dolly, "chat") == ("chat", "dolly-chat")
    assert settle(("prompt", "completion"), "chat") == ("chat", "dolly-chat")
    with pytest.raises(Undecided) as refused:
        settle(dolly, "complete")
    assert refused.value.hint == "they fit --goal instruct; or map them: --column text=COLUMN"
    with pytest.raises(Undecided, match="messages  messages"):
        settle(("messages",), "instruct")
    mapped = {"instruction": "q", "response": "a"}
    assert settle(("q", "a"), "instruct", mapped) == ("instruct", "dolly")
    assert settle(("q", "a"), "chat", mapped) == ("chat", "dolly-chat")
    with pytest.raises(Undecided):
        settle(("a", "b"), "instruct")


def test_goals_name_templates_and_fields_that_exist() -> None:
    for facts in GOALS.values():
        assert set(facts.templates) <= set(list_templates())
        template = load_template(facts.templates[0])
        assert set(facts.fields) == set(template.required)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (text, "text"),
        (lambda index: f"第{index}个问题如何解决？", "text"),
        (lambda index: ("open", "closed")[index % 2], "label"),
        (lambda index: index % 2 == 0, "label"),
        (lambda index: index * 7, "number"),
        (lambda index: f"{index * 7},5 %", "number"),
        (lambda index: f"T-{index}", "id"),
        (lambda index: f"{index:08x}-4c3d-11ee-be56-0242ac120002", "id"),
        (lambda index: f"2024-01-0{index + 1}T10:00:00Z", "form"),
        (lambda index: f"{index + 1}.12.2023", "form"),
        (lambda index: datetime.date(2024, 1, index + 1), "form"),
        (lambda index: f"https://example.com/{index}", "form"),
        (lambda index: f"person{index}@example.com", "form"),
        (lambda index: "always the same sentence", "constant"),
        (lambda index: None, "empty"),
        (lambda index: float("nan"), "empty"),
        (lambda index: " ", "empty"),
        (lambda index: [{"from": "human", "value": "a"}], "messages"),
        (lambda index: '[{"role": "user", "content": "a"}]', "messages"),
        (lambda index: f"pictures/{index}.png", "media"),
        (lambda index: {"bytes": b"1", "path": None}, "media"),
        (lambda index: {"en": "a", "fr": "b"}, "other"),
        (lambda index: ["a", "b"], "other"),
        (lambda index: ["a", 1][index % 2], "other"),
    ],
)
def test_what_a_column_holds(value: Callable[[int], object], kind: str) -> None:
    (column,) = describe_columns([{"column": value(index)} for index in range(8)])
    assert column.kind == kind


def test_preference_pairs_are_refused_unless_a_side_of_them_is_named() -> None:
    names = ("prompt", "chosen", "rejected")
    with pytest.raises(DataError, match=r"preference pairs .* cannot be trained by method sft") as refused:
        settle(names, None)
    assert "gemma-tune init rows --column instruction=prompt --column response=chosen" in (refused.value.hint or "")
    assert settle(names, None, {"instruction": "prompt", "response": "chosen"}) == ("instruct", "dolly")
