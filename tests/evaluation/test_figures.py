"""Figures of rows that were measured, against sums by hand."""

from __future__ import annotations

import pytest

from gemma_tune.evaluation.figures import RowResult, groups_of, measure_answer
from gemma_tune.runs.evaluation import METRICS, Figure, Group


def result(text: str, expected: str, *, nats: float = 1.0, tokens: int = 2, expects_json: bool = False) -> RowResult:
    return RowResult(
        nats, tokens, measure_answer("", text, expected, num_tokens=5, stopped=True, expects_json=expects_json)
    )


def figure(group: Group, metric: str) -> Figure:
    found = group.figure(metric)
    assert found is not None
    return found


BASE = [result("no", "yes", nats=8.0, tokens=4)] * 9 + [result("yes", "yes", nats=1.0, tokens=1)]
TUNED = [result("yes", "yes", nats=1.0, tokens=4)] * 8 + [result("no", "yes", nats=1.0, tokens=1)] * 2


def test_both_models_and_their_difference() -> None:
    (everything,) = groups_of({"base": BASE, "tuned": TUNED}, ["one"] * 10)
    assert [each.metric for each in everything.figures] == [
        "loss", "perplexity", "exact_match", "token_f1", "rouge_l", "stopped", "length",
    ]  # fmt: skip
    assert set(METRICS) == {*(each.metric for each in everything.figures), "valid_json"}
    matches = figure(everything, "exact_match")
    assert matches.base is not None and matches.tuned is not None and matches.difference is not None
    assert (matches.base.value, matches.tuned.value) == (0.1, 0.8)
    assert matches.difference.value == pytest.approx(0.7)
    assert matches.verdict == "better"
    loss = figure(everything, "loss")
    assert loss.base is not None and loss.tuned is not None
    assert (loss.base.value, loss.tuned.value) == (73 / 37, 10 / 34)  # by token, not by row
    assert loss.verdict == "better"
    assert figure(everything, "stopped").verdict is None  # the same
    assert figure(everything, "length").verdict is None  # neither more nor less is better


def test_worse_is_told_as_well() -> None:
    (everything,) = groups_of({"base": TUNED, "tuned": BASE}, ["one"] * 10)
    assert figure(everything, "loss").verdict == figure(everything, "exact_match").verdict == "worse"


def test_categories_come_by_size_and_rows_without_one_are_a_category() -> None:
    everything, *categories = groups_of({"tuned": TUNED}, ["small"] * 2 + [None] * 3 + ["large"] * 5)
    assert (everything.category, everything.rows) == (None, 10)
    assert [(group.category, group.rows) for group in categories] == [("large", 5), ("(none)", 3), ("small", 2)]
    matches = figure(categories[0], "exact_match")
    assert matches.base is None and matches.difference is None and matches.tuned is not None
    assert matches.tuned.value == pytest.approx(0.6)


def test_what_was_not_asked_is_left_out() -> None:
    texts = [RowResult(2.0, 4, None)] * 3
    (group,) = groups_of({"base": texts, "tuned": texts}, ["prose"] * 3)
    assert [each.metric for each in group.figures] == ["loss", "perplexity"]
    json_rows = [result('{"a": 1}', "x", expects_json=True), result("a", "x", expects_json=True)]
    (group,) = groups_of({"tuned": json_rows}, [None, None])
    valid = figure(group, "valid_json").tuned
    assert valid is not None and valid.value == 0.5
