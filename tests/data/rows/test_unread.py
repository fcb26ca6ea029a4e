"""What a row holds besides its template's fields is named, or the row is refused with the setting that drops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import Examples, read_examples
from gemma_tune.errors import DataError
from gemma_tune.recipe.schema import DataSection

ASKED, ANSWERED = {"role": "user", "content": "Who sings?"}, {"role": "assistant", "content": "Ann."}
CALL = [{"type": "function", "function": {"name": "find", "arguments": "{}"}}]
IMAGE = {"type": "image", "url": "a.png"}


def conversation(*, user: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **columns: Any) -> Any:
    return {"messages": [ASKED | (user or {}), ANSWERED | (model or {})], **columns}


def read(folder: Path, rows: list[Any], tokenizer: Any, **settings: Any) -> Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = DataSection(**{"source": str(path), "max_seq_tokens": 64, "eval_fraction": 0.0} | settings)
    inputs = open_inputs(section, prefers_chat=True)
    return read_examples(section, inputs, chat=ChatRenderer.from_tokenizer(tokenizer))


# A row with something that cannot be rendered, where it stands, and the names that drop it.
LOST: dict[str, tuple[Any, str, list[str]]] = {
    "tools": (conversation(tools=CALL), "tools", ["tools"]),
    "a call": (conversation(model={"tool_calls": CALL}), "messages[1].tool_calls", ["tool_calls"]),
    "tools and a call": (
        conversation(tools=CALL, model={"tool_calls": CALL}),
        "tools, messages[1].tool_calls",
        ["tools", "tool_calls"],
    ),
    "thoughts": (
        conversation(model={"reasoning_content": "Hm."}),
        "messages[1].reasoning_content",
        ["reasoning_content"],
    ),
    "thinking": (conversation(thinking="Hm."), "thinking", ["thinking"]),
    "pictures": (conversation(images=["a.png"]), "images", ["images"]),
    "a weight": (conversation(weight=0.5), "weight", ["weight"]),
    "a turn that is not learned": (conversation(model={"train": False}), "messages[1].train", ["train"]),
    "a name": (conversation(user={"name": "Bob"}), "messages[0].name", ["name"]),
    "a picture in a message": (
        conversation(user={"content": [{"type": "text", "text": "Who sings?"}, IMAGE]}),
        "messages[0].content[1]",
        ["image"],
    ),
    "an unknown part": (
        conversation(user={"content": [{"type": "input_audio", "data": "x"}, {"type": "text", "text": "Who sings?"}]}),
        "messages[0].content[0]",
        ["input_audio"],
    ),
    "history of plain text": (
        {"instruction": "Who sings?", "input": "", "output": "Ann.", "history": [["a", "b"]]},
        "history",
        ["history"],
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_row_with_a_part_that_cannot_be_rendered_is_refused_until_it_is_dropped(
    case: str, gemma3_tokenizer: Any, tmp_path: Path
) -> None:
    row, place, names = LOST[case]
    template = "alpaca" if "instruction" in row else "auto"
    plain = {"instruction": "Who?", "input": "", "output": "Bob."} if "instruction" in row else conversation()
    if "messages" in plain:
        plain["messages"] = [ASKED, ANSWERED | {"content": "Bob."}]
    setting = f"data.drop_fields: [{', '.join(names)}]"
    refusal = f"rows.jsonl:2: {place} cannot be rendered; {setting} trains the row without"
    report = read(tmp_path, [plain, row], gemma3_tokenizer, template=template).report
    assert (report.train_rows, report.rows_bad, report.bad_samples) == (1, 1, (refusal,))
    counts = ", ".join(f"{name} in 1 row" for name in names)
    assert report.notes == (f"refused for what cannot be rendered: {counts}; {setting} trains such rows without",)

    with pytest.raises(DataError) as caught:
        read(tmp_path, [row], gemma3_tokenizer, template=template)
    assert setting.removeprefix("data.") in (caught.value.hint or "")

    made = read(tmp_path, [plain, row], gemma3_tokenizer, template=template, drop_fields=names)
    assert made.report.rows_bad == 0
    assert set(made.report.notes) == {f"{name} is left out of 1 row (data.drop_fields)" for name in names}
    (dropped,) = [example for example in made.train if example.where.endswith(":2")]
    assert (dropped.question, dropped.response) == ("Who sings?", "Ann.")
    whole = "".join(segment.text for segment in dropped.segments)
    assert "find" not in whole and "Hm." not in whole and "Bob" not in whole


@pytest.mark.parametrize("role", ["tool", "function", "observation", "function_call"])
def test_turns_of_tools_are_refused_whatever_is_dropped(role: str, gemma3_tokenizer: Any, tmp_path: Path) -> None:
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": role, "content": "3"}]
    rows = [{"messages": [*messages, ANSWERED]}]
    for names in ([], ["tool_calls"]):
        with pytest.raises(DataError) as caught:
            read(tmp_path, rows, gemma3_tokenizer, drop_fields=names)
        problem = "messages[1]: content is missing" if names else f"messages[2]: role '{role}': turns of tools are not"
        assert f"rows.jsonl:1: {problem}" in str(caught.value)
        assert "drop_fields" not in str(caught.value) + str(caught.value.hint)


def test_a_system_turn_that_the_model_has_no_place_for_stands_before_the_first_user_message(
    tokenizer: Any, gemma3_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        conversation(system="Be brief."),
        {"messages": [{"role": "developer", "content": "Sing."}, ASKED, ANSWERED]},
    ]
    folded, as_gemma_3 = read(tmp_path, rows, tokenizer), read(tmp_path, rows, gemma3_tokenizer)
    assert [each.prompt_text for each in folded.train] == [each.prompt_text for each in as_gemma_3.train]
    said = "the model has no system turn: its text stands before the first user message (in 2 rows)"
    assert said in folded.report.notes and said not in as_gemma_3.report.notes
    made = read(tmp_path, rows, tokenizer, drop_fields=["system"])
    assert [example.prompt_text.count("brief") for example in made.train] == [0, 0]
    assert "system is left out of 2 rows (data.drop_fields)" in made.report.notes


def test_unknown_roles_are_named_together_with_the_setting(gemma3_tokenizer: Any, tmp_path: Path) -> None:
    rows = [conversation(user={"role": "customer"}, model={"role": "the shop"})] * 3
    with pytest.raises(DataError, match=r"unknown roles 'customer', 'the shop'; data\.roles: ") as caught:
        read(tmp_path, rows, gemma3_tokenizer)
    assert '`roles: {customer: user, "the shop": assistant}`' in (caught.value.hint or "")
    assert len(read(tmp_path, rows, gemma3_tokenizer, roles={"customer": "user", "the shop": "assistant"}).train) == 3


def test_columns_that_nothing_reads_are_named_once_with_their_rows(gemma3_tokenizer: Any, tmp_path: Path) -> None:
    rows: list[Any] = [
        conversation(user={"content": f"Who sings {n}?"}) | {"ticket_id": n, "empty": ""} for n in range(5)
    ]
    rows[3]["messages"][0]["at"] = "noon"
    rows[4]["label"] = "good"
    notes = read(tmp_path, rows, gemma3_tokenizer, drop_fields=["lable"]).report.notes
    assert notes == (
        "3 columns are not used: ticket_id, messages[].at, label (in 5 rows)",
        "data.drop_fields: no row holds lable; did you mean 'label'?",
    )


def test_developer_turns_are_said_to_be_system_turns(gemma3_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "developer", "content": "Be brief."}, ASKED, ANSWERED]}]
    assert read(tmp_path, rows, gemma3_tokenizer).report.notes == (
        "developer turns are read as system turns (in 1 row)",
    )


def test_what_the_template_needs_cannot_be_dropped(gemma3_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("messages", "content"):
        with pytest.raises(DataError, match=rf"data\.drop_fields: {name} is what the template chat reads"):
            read(tmp_path, [conversation()], gemma3_tokenizer, drop_fields=[name])


def test_a_pair_whose_answer_is_dropped_has_none(gemma3_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "Who sings?", "chosen": [{"role": "system", "content": "Ann."}], "rejected": "Bob."}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: chosen holds no answer"):
        read(tmp_path, rows, gemma3_tokenizer, drop_fields=["system"])
