"""Which template reads a source, and how several sources are mixed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.inputs import Inputs, detect_template, open_inputs, require_rows
from gemma_tune.data.rows.read import Examples, read_examples
from gemma_tune.data.sources.source import split_count
from gemma_tune.errors import DataError
from gemma_tune.recipe.methods import METHODS
from gemma_tune.recipe.schema import DataSection


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(name: str, count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"{name} {index}?", "response": f"It is {index}."} for index in range(count)]


def opened(prefers_chat: bool = False, **settings: Any) -> Inputs:
    return open_inputs(DataSection(**{"max_seq_tokens": 512} | settings), prefers_chat=prefers_chat)


def mixed(folder: Path, parts: list[dict[str, Any]], **settings: Any) -> Examples:
    section = DataSection(
        mix=[{**part, "source": str(folder / part["source"])} for part in parts], max_seq_tokens=512, **settings
    )
    return read_examples(section, open_inputs(section, prefers_chat=False), chat=None)


@pytest.mark.parametrize(
    ("columns", "base", "tuned"),
    [
        (("instruction", "context", "response", "category"), "dolly", "dolly-chat"),
        (("instruction", "input", "output"), "alpaca", "alpaca-chat"),
        (("messages",), "chat", "chat"),
        (("conversations", "system"), "chat", "chat"),
        (("conversations", "chosen", "rejected"), "preference", "preference"),
        (("prompt", "chosen", "rejected"), "preference", "preference"),
        (("prompt", "completion"), "completion", "completion"),
        (("text", "url"), "text", "text"),
    ],
)
def test_the_template_follows_from_the_columns(columns: tuple[str, ...], base: str, tuned: str) -> None:
    for prefers_chat, name in ((False, base), (True, tuned)):
        found = detect_template(columns, prefers_chat=prefers_chat)
        assert found is not None and found.name == name


def test_columns_that_nothing_fits_are_told_with_the_way_out(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", [{"q": "Who?", "a": "Ann."}])
    with pytest.raises(DataError, match=r"no shipped data template fits the columns of rows\.jsonl: q, a") as caught:
        opened(source=path)
    assert caught.value.hint is not None and "data.columns.instruction=" in caught.value.hint
    found = opened(source=path, columns={"instruction": "q", "response": "a"})
    assert (found.template.name, found.train[0].detected) == ("dolly", True)


def test_a_named_template_is_not_detected(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", numbered("a", 3))
    found = opened(source=path, template="dolly-chat")
    assert (found.template.name, found.train[0].detected) == ("dolly-chat", False)


@pytest.mark.parametrize("source", ["rows.jsonl#", "rows.jsonl#0", "rows.jsonl#-3", "rows.jsonl#many"])
def test_a_count_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="not a number of rows"):
        split_count(source)


def test_a_file_of_broken_lines_only_is_told_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n[1]\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl: 2 broken lines\n  rows\.jsonl:1:.*\n  rows\.jsonl:2: a list"):
        opened(source=str(path))


def from_each(examples: Examples) -> Counter[str]:
    return Counter(example.where.partition(".")[0] for example in examples.train)


def test_every_source_is_taken_whole_unless_told_otherwise(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", numbered("a", 40))
    save(tmp_path / "b.jsonl", [{"instruction": f"b {n}?", "input": "", "output": "Yes."} for n in range(10)])
    made = mixed(tmp_path, [{"source": "a.jsonl"}, {"source": "b.jsonl"}], eval_fraction=0.0)
    assert from_each(made) == {"a": 40, "b": 10}
    assert [source.template for source in made.report.sources] == ["dolly", "alpaca"]
    again = mixed(tmp_path, [{"source": "a.jsonl"}, {"source": "b.jsonl"}], eval_fraction=0.0)
    assert [example.where for example in again.train] == [example.where for example in made.train]
    first_half = Counter(example.where[0] for example in made.train[:25])
    assert first_half["b"] >= 1  # interleaved, not one behind the other


def test_a_count_takes_rows_and_repeats_them_where_there_are_fewer(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", numbered("a", 40))
    save(tmp_path / "b.jsonl", numbered("b", 10))
    made = mixed(tmp_path, [{"source": "a.jsonl#15"}, {"source": "b.jsonl#25"}], eval_fraction=0.0)
    assert from_each(made) == {"a": 15, "b": 25}
    times = Counter(example.where for example in made.train if example.where.startswith("b"))
    assert sorted(times.values()) == [2] * 5 + [3] * 5
    assert [source.repeats for source in made.report.sources] == [0, 15]
    assert made.report.num_unused == 25


def test_weights_leave_rows_out_and_repeat_none(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", numbered("a", 40))
    save(tmp_path / "b.jsonl", numbered("b", 10))
    parts = [{"source": "a.jsonl", "weight": 1}, {"source": "b.jsonl", "weight": 0.5}]
    made = mixed(tmp_path, parts, eval_fraction=0.0)
    assert from_each(made) == {"a": 20, "b": 10}
    assert max(Counter(example.where for example in made.train).values()) == 1


def test_rows_are_held_out_before_they_are_repeated(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", numbered("a", 30))
    made = mixed(tmp_path, [{"source": "a.jsonl#300"}], eval_fraction=0.3)
    assert len(made.train) == 300 and made.eval
    assert not {example.key for example in made.train} & {example.key for example in made.eval}


def test_rows_of_another_kind_than_the_method_trains_are_refused(tmp_path: Path) -> None:
    responses = opened(source=save(tmp_path / "responses.jsonl", numbered("a", 3)))
    pairs = opened(source=save(tmp_path / "pairs.jsonl", [{"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}]))
    sft, of_pairs = METHODS["sft"], replace(METHODS["sft"], name="pairs", rows="pair")
    require_rows(responses, sft)
    require_rows(pairs, of_pairs)
    with pytest.raises(DataError, match=r"pairs\.jsonl holds preference pairs .*cannot be trained by method sft"):
        require_rows(pairs, sft)
    with pytest.raises(DataError, match=r"holds prompts with their responses, which cannot .* method pairs") as caught:
        require_rows(responses, of_pairs)
    assert caught.value.hint == "set method=sft"
