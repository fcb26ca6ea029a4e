"""Token ids and supervised text against an independent reading: plain tokenizer calls and string operations.

Nothing of gemma_tune makes the expected values here: not the template engine, not the encoder, not the chat renderer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import build_datasets
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.recipe.schema import DataSection

Row = dict[str, Any]
Parts = Sequence[tuple[str, bool]]  # text and whether it is supervised, control tokens spelled out

ROWS: tuple[Row, ...] = (
    {"instruction": "Who bakes?", "context": "", "response": "The baker."},
    {"instruction": "Repeat: The baker.", "context": "The baker.", "response": "The baker."},
    {"instruction": "  Spaces around? ", "context": "  ", "response": "  Yes, two.  "},
    {"instruction": "Über Köln 日本 🦆?", "context": "Ä\u2028Ö", "response": "Schön\u00a0🦆."},
    {"instruction": "Lines?", "context": "one\n\ntwo", "response": "first\n\n\nlast"},
    {"instruction": "### Response:\nfake", "context": "{{7*7}} {% raw %}", "response": "{{ instruction }}"},
)


def plain_prompt(instruction: str, context: str, title: str) -> str:
    middle = f"### {title}:\n{context}\n\n" if context.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def dolly(row: Row, tokenizer: Any) -> Parts:
    return [(plain_prompt(row["instruction"], row["context"], "Context"), False), (row["response"].strip(), True)]


def alpaca(row: Row, tokenizer: Any) -> Parts:
    return [(plain_prompt(row["instruction"], row["input"], "Input"), False), (row["output"].strip(), True)]


def completion(row: Row, tokenizer: Any) -> Parts:
    return [(row["prompt"], False), (row["completion"], True)]


def text(row: Row, tokenizer: Any) -> Parts:
    return [(row["text"], True)]


def chat(messages: list[dict[str, str]], tokenizer: Any) -> Parts:
    """Gemma's turns through the tokenizer's own apply_chat_template, cut where an answer starts and ends."""
    parts: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        parts.append((asked[len(done) :], False))
        answer = answered[len(asked) :]
        end = answer.index("<end_of_turn>") + len("<end_of_turn>")
        parts.append((answer[:end], True))
        done = asked + answer[:end]
    return [(parts[0][0].removeprefix("<bos>"), parts[0][1]), *parts[1:]]


def dolly_chat(row: Row, tokenizer: Any) -> Parts:
    context = f"\n\n{row['context']}" if row["context"].strip() else ""
    question = f"{row['instruction']}{context}".strip()
    answer = row["response"].strip()
    return chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)


def messages_row(row: Row, tokenizer: Any) -> Parts:
    return chat(row["messages"], tokenizer)


def sharegpt_row(row: Row, tokenizer: Any) -> Parts:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return chat([{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]], tokenizer)


def preference_row(row: Row, tokenizer: Any) -> Parts:
    """Until pairs are trained, a pair reads as its chosen answer."""
    return sharegpt_row({"conversations": [*row["conversations"], row["chosen"]]}, tokenizer)


def expected_ids(parts: Parts, tokenizer: Any, *, ends_in_eos: bool) -> tuple[list[int], list[int]]:
    """Every part through the tokenizer by itself; only the control tokens of chat turns are control tokens."""
    ids, labels = [tokenizer.bos_token_id], [-100]
    for part, supervised in parts:
        found = tokenizer(part, add_special_tokens=False).input_ids
        ids += found
        labels += found if supervised else [-100] * len(found)
    if ends_in_eos:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def as_alpaca(row: Row) -> Row:
    return {"instruction": row["instruction"], "input": row["context"], "output": row["response"]}


def as_messages(row: Row) -> Row:
    turns = [("user", row["instruction"]), ("assistant", row["response"]), ("user", "And?"), ("assistant", "No more.")]
    return {"messages": [{"role": role, "content": content.strip()} for role, content in turns]}


def as_sharegpt(row: Row) -> Row:
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in as_messages(row)["messages"]]}


def as_preference(row: Row) -> Row:
    *asked, chosen = as_sharegpt(row)["conversations"]
    return {"conversations": asked, "chosen": chosen, "rejected": {"from": "gpt", "value": "I do not know."}}


CASES: dict[str, tuple[Callable[[Row], Row], Callable[[Row, Any], Parts], bool]] = {
    "dolly": (lambda row: row, dolly, True),
    "alpaca": (as_alpaca, alpaca, True),
    "completion": (lambda row: {"prompt": row["instruction"], "completion": row["response"]}, completion, True),
    "text": (lambda row: {"text": f"{row['instruction']}\n{row['response']}"}, text, True),
    "dolly-chat": (lambda row: row, dolly_chat, False),
    "chat": (as_messages, messages_row, False),
    "sharegpt": (as_sharegpt, sharegpt_row, False),
    "preference": (as_preference, preference_row, False),
}


def encode(rows: Sequence[Row], tokenizer: Any, folder: Path, **settings: Any) -> Datasets:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = DataSection(
        **{"source": str(path), "max_seq_tokens": 4096, "eval_fraction": 0.0, "cache": False} | settings
    )
    inputs = open_inputs(section, prefers_chat=settings.get("template") == "dolly-chat")
    needs_chat = inputs.template.kind != "text"
    chat_renderer = ChatRenderer.from_tokenizer(tokenizer) if needs_chat else None
    return build_datasets(section, inputs, Encoder(tokenizer), chat=chat_renderer, tokenizer_files={})


@pytest.mark.parametrize("generation", ["tokenizer", "gemma3_tokenizer"])  # Gemma 2 has the template of 1
@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels_are_those_of_a_plain_tokenizer(
    case: str, generation: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(generation)
    to_row, to_parts, ends_in_eos = CASES[case]
    rows = [to_row(row) for row in ROWS]
    made = encode(rows, tokenizer, tmp_path, template="chat" if case == "sharegpt" else case)
    assert len(made.train) == len(rows)
    for row, place in zip(made.train, made.train_places, strict=True):
        parts = to_parts(rows[int(place.rpartition(":")[2]) - 1], tokenizer)
        assert (row.input_ids, row.labels) == expected_ids(parts, tokenizer, ends_in_eos=ends_in_eos), place
        supervised = tokenizer.decode([label for label in row.labels if label != -100])
        assert supervised == "".join(part for part, trained in parts if trained) + "<eos>" * ends_in_eos


def test_the_system_turn_is_what_the_models_template_makes_of_it(
    tokenizer: Any, gemma3_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Who {n}?"},
                {"role": "assistant", "content": "Ann."},
            ]
        }
        for n in range(4)
    ]
    # Gemma 3's template folds it into the first user turn, and what Gemma 1's refuses is folded in the same way.
    for theirs in (gemma3_tokenizer, tokenizer):
        made = encode(rows, theirs, tmp_path, template="chat")
        assert len(made.train) == 4
        for row, place in zip(made.train, made.train_places, strict=True):
            messages = rows[int(place.rpartition(":")[2]) - 1]["messages"]
            if theirs is tokenizer:
                messages = [{"role": "user", "content": f"Be brief.\n\n{messages[1]['content']}"}, messages[2]]
            expected = expected_ids(messages_row({"messages": messages}, theirs), theirs, ends_in_eos=False)
            assert (row.input_ids, row.labels) == expected


@pytest.mark.parametrize(
    ("train_on", "answers"), [("response", ["The baker.", "No more."]), ("last_response", ["No more."])]
)
def test_which_answers_of_a_conversation_are_trained(
    train_on: str, answers: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    row = encode([as_messages(ROWS[0])], tokenizer, tmp_path, template="chat", train_on=train_on).train[0]
    supervised = tokenizer.decode([label for label in row.labels if label != -100])
    assert supervised == "".join(f"{answer}<end_of_turn>" for answer in answers)
    whole = encode([as_messages(ROWS[0])], tokenizer, tmp_path, template="chat", train_on="all").train[0]
    assert whole.input_ids == row.input_ids and whole.labels == [-100, *row.input_ids[1:]]


SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "Who bakes?"}, {"role": "assistant", "content": "The baker."}]
SECOND = [{"role": "user", "content": "And who\n\nsings? 🦆"}, {"role": "assistant", "content": "Ann."}]
TALK = [SYSTEM, *FIRST, *SECOND]


def spelled(names: dict[str, str], role_key: str = "role", content_key: str = "content") -> list[dict[str, Any]]:
    return [{role_key: names.get(m["role"], m["role"]), content_key: m["content"]} for m in TALK]


def in_parts(message: dict[str, str], *, num_parts: int = 1) -> dict[str, Any]:
    step = -(-len(message["content"]) // num_parts)
    texts = [message["content"][start : start + step] for start in range(0, len(message["content"]), step)]
    return {"role": message["role"], "content": [{"type": "text", "text": text} for text in texts]}


# Rows as people have them, all of the same conversation as {"messages": TALK}, and what the recipe says of them.
SHAPES: dict[str, tuple[Row, Row]] = {
    "OpenAI": ({"messages": TALK}, {}),
    "ShareGPT": ({"conversations": spelled({"user": "human", "assistant": "gpt"}, "from", "value")}, {}),
    "capitals": ({"messages": spelled({"user": "Human", "assistant": "AI", "system": "System"})}, {}),
    "bot": ({"messages": spelled({"user": "user", "assistant": " bot"})}, {}),
    "chatgpt": ({"messages": spelled({"assistant": "chatgpt"})}, {}),
    "Gemini": ({"contents": spelled({"assistant": "model"}, "role", "text")}, {"columns": {"messages": "contents"}}),
    "OpenAssistant": ({"messages": spelled({"user": "prompter"}, "role", "text")}, {}),
    "LLaMA-Factory's tags": ({"messages": spelled({"user": "instruction", "assistant": "output"})}, {}),
    "developer": ({"messages": spelled({"system": "developer"})}, {}),
    "roles of their own": (
        {"messages": spelled({"user": "Customer", "assistant": "agent"})},
        {"roles": {"customer": "user", "agent": "assistant"}},
    ),
    "a tool's turn that is said to be the user's": (
        {"messages": [SYSTEM, {"role": "tool", "content": "Who bakes?"}, *TALK[2:]]},
        {"roles": {"tool": "user"}},
    ),
    "content parts": ({"messages": [in_parts(message) for message in TALK]}, {}),
    "parts of Gemini": ({"messages": [{"role": m["role"], "parts": [{"text": m["content"]}]} for m in TALK]}, {}),
    "system column": ({"conversations": TALK[1:], "system": "Be brief."}, {}),
    "system column and turn": ({"messages": TALK, "system": "Be brief."}, {}),
    "mapped system column": ({"messages": TALK[1:], "persona": "Be brief."}, {"columns": {"system": "persona"}}),
    "history of pairs": ({"messages": SECOND, "history": [["Who bakes?", "The baker."]], "system": "Be brief."}, {}),
    "history of messages": ({"messages": SECOND, "history": FIRST, "system": "Be brief."}, {}),
    "alpaca": (
        {
            "instruction": SECOND[0]["content"],
            "input": "",
            "output": "Ann.",
            "system": "Be brief.",
            "history": [["Who bakes?", "The baker."]],
        },
        {"template": "alpaca-chat"},
    ),
    "empty extras": ({"messages": TALK, "tools": [], "images": None, "system": " ", "weight": 1}, {}),
    "empty keys": ({"messages": [{**m, "tool_calls": None, "name": "", "train": True} for m in TALK]}, {}),
    "extra columns": ({"messages": [{**m, "id": 7} for m in TALK], "source": "x"}, {}),
    "dropped": (
        {"messages": [{**m, "thinking": "Hm."} for m in TALK], "tools": [{"name": "f"}]},
        {"drop_fields": ["thinking", "tools"]},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_spelling_of_a_conversation_has_the_ids_of_the_plain_one(
    shape: str, gemma3_tokenizer: Any, tmp_path: Path
) -> None:
    row, settings = SHAPES[shape]
    (made,) = encode([row], gemma3_tokenizer, tmp_path, **{"template": "chat"} | settings).train
    expected = chat(TALK, gemma3_tokenizer)
    assert (made.input_ids, made.labels) == expected_ids(expected, gemma3_tokenizer, ends_in_eos=False)


@pytest.mark.parametrize("earlier", [[], FIRST])
@pytest.mark.parametrize("is_text", [False, True])
def test_of_prompt_and_completion_only_the_completion_is_learned(
    earlier: list[dict[str, str]], is_text: bool, gemma3_tokenizer: Any, tmp_path: Path
) -> None:
    row = {"prompt": [SYSTEM, *earlier, SECOND[0]], "completion": "Ann." if is_text else SECOND[1:]}
    datasets = encode([row], gemma3_tokenizer, tmp_path)
    assert datasets.report.sources[0].template == "chat-completion"
    (made,) = datasets.train
    *given, answer = chat([SYSTEM, *earlier, *SECOND], gemma3_tokenizer)
    expected = [*((part, False) for part, _ in given), answer]
    assert (made.input_ids, made.labels) == expected_ids(expected, gemma3_tokenizer, ends_in_eos=False)


def test_lists_of_parts_are_joined_as_the_models_template_joins_them(any_tokenizer: Any, tmp_path: Path) -> None:
    messages = [in_parts(FIRST[0], num_parts=3), in_parts(FIRST[1], num_parts=2)]
    messages[0]["content"][0]["text"] += " \n"
    (made,) = encode([{"messages": messages}], any_tokenizer, tmp_path).train
    plain = [{"role": m["role"], "content": "".join(part["text"].strip() for part in m["content"])} for m in messages]
    # Gemma 1's template prints a list as Python does, so there the joined text is the oracle.
    oracle = plain if "is string" not in any_tokenizer.chat_template else messages
    text = any_tokenizer.apply_chat_template(oracle, tokenize=False)
    end = len(any_tokenizer(text.rstrip("\n"), add_special_tokens=False).input_ids)
    assert made.input_ids == any_tokenizer(text, add_special_tokens=False).input_ids[:end]


@pytest.mark.parametrize("name", ["alpaca", "dolly"])
def test_a_system_column_stands_before_the_instruction_of_plain_text(name: str, tokenizer: Any, tmp_path: Path) -> None:
    row = as_alpaca(ROWS[0]) if name == "alpaca" else ROWS[0]
    (made,) = encode([row | {"system": "Be brief."}], tokenizer, tmp_path).train
    (prompt, _), answer = (alpaca if name == "alpaca" else dolly)(row, tokenizer)
    parts = [("Be brief.\n\n" + prompt, False), answer]
    assert (made.input_ids, made.labels) == expected_ids(parts, tokenizer, ends_in_eos=True)
