"""Numbers, empty cells and messages in text, as tables have them; json and Python's parser are the oracles."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.sources.cells import as_messages, as_text, read_cells

TALK = [{"role": "user", "content": 'Say "hé"\n'}, {"role": "assistant", "content": "it's\tfine"}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (42, "42"),
        (-1.5, "-1.5"),
        (3.0, "3.0"),
        (True, "true"),
        (False, "false"),
        (Decimal("1.10"), "1.10"),
        (datetime.date(2024, 1, 5), "2024-01-05"),
        (datetime.datetime(2024, 1, 5, 10), "2024-01-05T10:00:00"),
        (float("nan"), None),
        (pandas.NaT, None),
        ("nan", "nan"),
        ("", ""),
        (float("inf"), float("inf")),
        ([1], [1]),
    ],
)
def test_a_value_as_text(value: object, expected: object) -> None:
    assert as_text(value) == expected


@settings(max_examples=100)
@given(st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_are_spelled_as_json_does(value: object) -> None:
    text = as_text(value)
    assert isinstance(text, str) and json.loads(text) == value


@pytest.mark.parametrize("spell", [json.dumps, repr, lambda talk: f"\n {json.dumps(talk, indent=2)} "])
@pytest.mark.parametrize("talk", [TALK, TALK[0], [{"from": "human", "value": "x"}]])
def test_messages_in_text_are_read(spell: object, talk: object) -> None:
    assert as_messages(spell(talk)) == talk  # type: ignore[operator]


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        "[",
        "[]",
        "{}",
        "[1, 2]",
        '["role"]',
        '{"name": "x"}',
        '[{"a": 1}]',
        "[" * 100_000,
        "{'role': f()}",
        "nan",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert as_messages(text) is text


def test_a_row_is_only_changed_where_it_must_be() -> None:
    row = {"a": "x", "m": TALK, "n": 7, "other": 1.5}
    assert read_cells(row, texts=("a",), messages=("m",)) == (row, [])
    assert read_cells(row, texts=("a",), messages=("m",))[0] is row
    assert read_cells(row, texts=("a", "n", "gone"), messages=("m",)) == ({**row, "n": "7"}, ["n"])
    told = {"m": json.dumps(TALK), "t": json.dumps(TALK), "e": float("nan")}
    assert read_cells(told, texts=("t", "e"), messages=("m",)) == ({**told, "m": TALK, "e": None}, [])
    assert read_cells({"m": float("nan")}, texts=(), messages=("m",)) == ({"m": None}, [])


def test_numbers_in_messages_are_text() -> None:
    answers = [{"role": "user", "content": 3}, {"from": "gpt", "value": True}, "no message", {"content": [1]}]
    row, spelled = read_cells({"m": answers, "one": answers[0], "same": TALK}, texts=(), messages=("m", "one", "same"))
    texts = [{"role": "user", "content": "3"}, {"from": "gpt", "value": "true"}, "no message", {"content": [1]}]
    assert (row, spelled) == ({"m": texts, "one": texts[0], "same": TALK}, ["m", "one"])
