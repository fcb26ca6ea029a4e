"""What `init` sees in rows: goal, template, columns and lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma_tune.data.look.glance import (
    GOALS,
    MAX_MEASURED_ROWS,
    TEMPLATE_TOKENS,
    Goal,
    find_template,
    guess_columns,
    likely_goal,
    measure_rows,
    open_rows,
    read_columns,
)
from gemma_tune.data.rows.template import list_templates, load_template
from gemma_tune.errors import DataError
from gemma_tune.paths import TINY_MODEL_DIR, TINY_ROWS_DIR


@pytest.mark.parametrize(
    ("columns", "goal", "template"),
    [
        (("instruction", "context", "response", "category"), "instruct", "dolly"),
        (("instruction", "input", "output"), "instruct", "alpaca"),
        (("messages",), "chat", "chat"),
        (("conversations", "id"), "chat", "chat"),
        (("text",), "complete", "text"),
        (("prompt", "completion"), "complete", "completion"),
        (("Frage", "Antwort"), "instruct", None),
    ],
)
def test_columns_tell_the_goal(columns: tuple[str, ...], goal: Goal, template: str | None) -> None:
    assert likely_goal(columns) == goal
    assert find_template(columns, {}, goal=goal) == template


def test_a_goal_takes_only_templates_that_serve_it() -> None:
    dolly = ("instruction", "context", "response")
    assert find_template(dolly, {}, goal="chat") == "dolly-chat"
    assert find_template(dolly, {}, goal="complete") is None
    assert find_template(("messages",), {}, goal="instruct") is None
    mapped = {"instruction": "q", "response": "a"}
    assert find_template(("q", "a"), mapped, goal="instruct") == "dolly"
    assert find_template(("q", "a"), mapped, goal="chat") == "dolly-chat"


def test_goals_name_templates_and_fields_that_exist() -> None:
    for facts in GOALS.values():
        assert set(facts.templates) <= set(list_templates())
        template = load_template(facts.templates[0])
        assert set(facts.fields) == set(template.required)


def test_columns_are_guessed_by_name_and_each_once() -> None:
    assert guess_columns(("Question", "ANSWER", "id"), goal="instruct") == {
        "instruction": "Question",
        "response": "ANSWER",
    }
    assert guess_columns(("prompt", "completion"), goal="chat") == {"instruction": "prompt", "response": "completion"}
    assert guess_columns(("body", "date"), goal="complete") == {"text": "body"}
    assert guess_columns(("a", "b"), goal="instruct") == {}


def test_preference_pairs_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"preference pairs .* cannot be trained by method sft"):
        read_columns(str(path))
    assert read_columns("tiny-world#5") == ("instruction", "context", "response", "category")


def test_lengths_are_those_of_the_tokenizer() -> None:
    rows = open_rows("tiny-world", template="dolly", columns={})
    lengths = measure_rows(rows, tokenizer=TINY_MODEL_DIR / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)
    lines = (TINY_ROWS_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = []
    for line in lines:
        row = json.loads(line)
        texts.append("\n".join(row[name] for name in ("instruction", "response", "context")))
    expected = sorted(len(ids) + TEMPLATE_TOKENS for ids in tokenizer(texts)["input_ids"])
    # The order in which fields are joined may cost or save a token at a border.
    assert lengths.num_rows == len(lines)
    assert len(lengths.tokens) == len(lines)
    assert max(abs(a - b) for a, b in zip(lengths.tokens, expected, strict=True)) <= 2


def test_without_a_tokenizer_bytes_are_counted_and_only_so_many_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "' + "ä" * 350 + '"}\n' + '{"text": "abc"}\n' * MAX_MEASURED_ROWS, encoding="utf-8")
    rows = open_rows(str(path), template="text", columns={})
    lengths = measure_rows(rows, tokenizer=None)
    assert lengths.num_rows == MAX_MEASURED_ROWS
    assert (lengths.tokens[0], lengths.tokens[-1]) == (1 + TEMPLATE_TOKENS, 200 + TEMPLATE_TOKENS)
    only_ids = tmp_path / "empty.jsonl"
    only_ids.write_text('{"text": null}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no row has a text"):
        measure_rows(open_rows(str(only_ids), template="text", columns={}), tokenizer=None)
