"""Metrics against the scripts that define them."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.data.metrics import squad_metrics

from gemma_tune.evaluation.answer_metrics import count_words, is_exact_match, is_json, rouge_l, token_f1

words = st.lists(st.sampled_from(["a", "the", "cat", "sat", "mat.", "Mat", "on-top", "9", "é", "—"]), max_size=8)
texts = words.map(" ".join)


def test_white_space_does_not_count_but_letters_do() -> None:
    assert is_exact_match(" Mara lives\nin Ostel. ", "Mara lives in Ostel.")
    assert not is_exact_match("Mara lives in ostel.", "Mara lives in Ostel.")
    assert not is_exact_match("", "x")


@given(answer=texts, expected=texts)
@settings(max_examples=200, deadline=None)
def test_token_f1_is_that_of_squad(answer: str, expected: str) -> None:
    # transformers carries SQuAD's own script; its compute_f1 is (gold, predicted).
    assert token_f1(answer, expected) == pytest.approx(squad_metrics.compute_f1(expected, answer))


@given(answer=texts, expected=texts)
@settings(max_examples=200, deadline=None)
def test_rouge_l_is_what_trying_all_subsequences_gives(answer: str, expected: str) -> None:
    first = answer.lower().replace(".", "").replace("—", "").replace("-", " ").split()
    second = expected.lower().replace(".", "").replace("—", "").replace("-", " ").split()
    if not first or not second:
        assert rouge_l(answer, expected) == 0
        return
    longest = max(
        size
        for size in range(len(first) + 1)
        for chosen in itertools.combinations(first, size)
        if _is_subsequence(chosen, second)
    )
    precision, recall = longest / len(first), longest / len(second)
    f1 = 2 * precision * recall / (precision + recall) if longest else 0.0
    assert rouge_l(answer, expected) == pytest.approx(f1)


def _is_subsequence(chosen: tuple[str, ...], text: list[str]) -> bool:
    rest = iter(text)
    return all(word in rest for word in chosen)


@given(answer=st.text(alphabet="abAB 9.,-_\n", max_size=40), expected=st.text(alphabet="abAB 9.,-_\n", max_size=40))
@settings(max_examples=200, deadline=None)
def test_rouge_l_is_that_of_rouge_score_on_ascii(answer: str, expected: str) -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    assert rouge_l(answer, expected) == pytest.approx(scorer.score(expected, answer)["rougeL"].fmeasure)


def test_rouge_l_reads_other_scripts() -> None:
    assert rouge_l("Öl und Käse", "öl, käse!") == pytest.approx(2 * 2 / 5)
    assert rouge_l("мама мыла раму", "мама мыла раму") == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
@settings(max_examples=50, deadline=None)
def test_json_that_was_dumped_is_json(value: object) -> None:
    assert is_json(json.dumps(value))
    assert is_json(f" {json.dumps(value)}\n")
    assert not is_json("Here it is: " + json.dumps(value))


@pytest.mark.parametrize("text", ["", "NaN", '{"a": Infinity}', "{'a': 1}", '{"a": 1,}', "[" * 100_000])
def test_what_is_no_json(text: str) -> None:
    assert not is_json(text)


def test_words_are_counted_between_white_space() -> None:
    assert count_words("  one two,three\nfour ") == 3
