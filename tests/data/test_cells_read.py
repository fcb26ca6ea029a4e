"""Rows of tables on their way to the training: numbers, empty cells and messages in text, in every container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import Examples, read_examples
from gemma_tune.errors import DataError
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.schema import DataSection

Rows = list[dict[str, Any]]


def as_csv(path: Path, rows: Rows) -> None:
    pandas.DataFrame(rows).to_csv(path, index=False)


def as_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_columns(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))


def as_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_saved(path: Path, rows: Rows) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


CONTAINERS = {
    "rows.csv": as_csv,
    "rows.jsonl": as_jsonl,
    "rows.json": as_columns,
    "rows.parquet": as_parquet,
    "rows": as_saved,
}


def gemma_turns() -> ChatRenderer:
    template = (TINY_MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    marks = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return ChatRenderer(template, bos_token="<bos>", eos_token="<eos>", control_strings=marks)


def read(path: Path, **settings: Any) -> Examples:
    given = {"source": str(path), "max_seq_tokens": 512, "eval_fraction": 0, "max_bad_fraction": 0} | settings
    section = DataSection(**given)
    inputs = open_inputs(section, prefers_chat=False)
    return read_examples(section, inputs, chat=gemma_turns() if inputs.needs_chat else None)


def in_order(examples: Examples) -> list[str]:
    return [example.response for example in sorted(examples.train, key=lambda example: example.question)]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize(
    ("answers", "expected"),
    [([42, 7, -1], ["42", "7", "-1"]), ([True, False, True], ["true", "false", "true"]), ([0.5, 2.0, 1e9], None)],
)
def test_numbers_and_truth_values_are_answers(
    tmp_path: Path, name: str, answers: list[Any], expected: list[str] | None
) -> None:
    rows = [{"instruction": f"Question {number}?", "response": answer} for number, answer in enumerate(answers)]
    CONTAINERS[name](tmp_path / name, rows)
    examples = read(tmp_path / name)
    if name == "rows.csv":  # has text already, as pandas spells it
        expected = [str(answer) for answer in answers]
        assert examples.report.notes == ()
    else:
        said = "numbers, truth values or dates, which are read as text (42, 1.5, true, 2024-01-05)"
        assert examples.report.notes == (f"response holds {said} in 3 rows",)
    assert in_order(examples) == (expected or [json.dumps(answer) for answer in answers])


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("missing", [float("nan"), None])
def test_an_empty_cell_of_an_optional_column_is_empty(tmp_path: Path, name: str, missing: float | None) -> None:
    # A column of text in a table has no NaN; where all of it is missing pandas makes it one of numbers.
    contexts = [missing] * 3 if name in ("rows.parquet", "rows") else ["Here.", missing, missing]
    rows = [{"instruction": f"Question {n}?", "context": contexts[n], "response": "Yes."} for n in range(3)]
    CONTAINERS[name](tmp_path / name, rows)
    examples = read(tmp_path / name)
    assert in_order(examples) == ["Yes."] * 3 and examples.report.notes == ()
    prompts = {example.question: example.prompt_text for example in examples.train}
    assert ("Here." in prompts["Question 0?"]) == (contexts[0] == "Here.")
    assert "nan" not in prompts["Question 2?"].lower()


def test_an_empty_cell_of_a_required_column_is_named_and_the_word_nan_is_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    as_jsonl(path, [{"instruction": "What is not a number?", "response": "nan"}, {"instruction": "a", "response": "b"}])
    assert sorted(in_order(read(path))) == ["b", "nan"]
    as_jsonl(path, [{"instruction": "a", "response": "b"}, {"instruction": "c", "response": float("nan")}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: response is missing"):
        read(path)


def talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Who is {number}?"}, {"role": "assistant", "content": 'a@b.org, it\'s "me"'}]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("spell", [json.dumps, str])
def test_messages_in_a_cell_are_read_and_cleaned_as_messages(tmp_path: Path, name: str, spell: Any) -> None:
    rows = [{"id": number, "messages": spell(talk(number))} for number in range(3)]
    CONTAINERS[name](tmp_path / name, rows)
    assert in_order(read(tmp_path / name)) == [talk(0)[1]["content"]] * 3
    assert in_order(read(tmp_path / name, clean={"pii": "mask"})) == ['[EMAIL], it\'s "me"'] * 3


def test_preference_pairs_and_prompts_in_text_are_read_as_messages(tmp_path: Path) -> None:
    sides = {side: json.dumps([talk(1)[0], {"role": "assistant", "content": side}]) for side in ("chosen", "rejected")}
    as_csv(tmp_path / "rows.csv", [sides])
    assert [example.response for example in read(tmp_path / "rows.csv").train] == ["chosen"]
    as_csv(tmp_path / "rows.csv", [{"prompt": json.dumps(talk(1)[:1]), "completion": json.dumps(talk(1)[1:])}])
    (example,) = read(tmp_path / "rows.csv").train
    assert (example.question, example.response) == ("Who is 1?", talk(1)[1]["content"])


@pytest.mark.parametrize("answer", ['{"role": "mayor", "name": "Ann"}', '[{"role": "user", "content": "x"}]', "[1, 2]"])
def test_json_as_an_answer_stays_text(tmp_path: Path, answer: str) -> None:
    as_csv(tmp_path / "rows.csv", [{"instruction": "Who?", "response": answer}])
    assert [example.response for example in read(tmp_path / "rows.csv").train] == [answer]
