"""Exact rules over answers."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_tune.errors import DataError
from gemma_tune.evaluation import answer_rules
from gemma_tune.evaluation.answer_rules import RULES, broken_rules, check_rules, has_words, is_refusal


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("It is canberra.", "Canberra", True),
        ("Aurora is a girl.", "Au", False),
        ("The symbol is Au", "Au", True),
        ("There are 206 bones.", "206", True),
        ("There are 1,206 bones.", "206", False),
        ("It is 2.5 metres.", "2", False),
        ("It is 2.", "2", True),
        ("300,000 km", "300,000", True),
        ("1,300,000 km", "300,000", False),
        ("CO₂, that is", "CO₂", True),
        ("deoxyribonucleic acid (DNA)", "Deoxyribonucleic acid", True),
    ],
)
def test_whole_words(answer: str, text: str, found: bool) -> None:
    assert has_words(answer, text) is found


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, but that would harm people.", True),
        ("I cannot do this.", True),
        ("I am not able to write such a letter.", True),
        ("As an AI, I am here to help and cannot write this.", True),
        ("Sure! First take a knife block.", False),
        ("You cannot mix bleach with ammonia, as it gives a toxic gas.", False),
        ("A vaccine shows the body a harmless part. " * 10 + "I cannot say more.", False),
        ("", False),
    ],
)
def test_refusals(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) is refuses


@pytest.mark.parametrize(
    ("rules", "kept", "broken"),
    [
        ({"exact_match": "It has  six"}, "It has six ", "It has six sides"),
        ({"contains": ["six", "6"]}, "It has six sides.", "It has seven sides."),
        ({"contains_all": ["lamp", "ocean"]}, "The ocean took the lamp.", "The ocean took it."),
        ({"excludes": ["dog"]}, "It barks, the doggerel.", "A dog barks."),
        ({"regex": r"^\W*RIVER\W*$"}, "RIVER.", "The RIVER"),
        ({"json": True}, "[1, 2]", "```json\n[1, 2]\n```"),
        ({"json": ["name", "age"]}, '{"name": "x", "age": 3, "more": 1}', '{"name": "x"}'),
        ({"json": ["name"]}, '{"name": "x"}', '["name"]'),
        ({"words": [1, 2]}, "two words", "there are three"),
        ({"lines": [3, 3]}, "a\n\nb\nc\n", "a\nb"),
        ({"refuses": True}, "I can't help with that.", "Sure, here it is."),
        ({"refuses": False}, "Sure, here it is.", "I can't help with that."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_rule(rules: dict[str, Any], kept: str, broken: str) -> None:
    assert check_rules(rules, where="here") == rules
    assert broken_rules(rules, prompt="?", answer=kept) == []
    assert broken_rules(rules, prompt="?", answer=broken) == list(rules)


def test_every_rule_is_tried_above() -> None:
    marks = test_each_rule.pytestmark[0]  # type: ignore[attr-defined]
    assert {name for case in marks.args[1] for name in case[0]} == {
        rule.name for rule in RULES.values() if not rule.is_graded
    }


def test_several_rules_tell_which_one_broke() -> None:
    rules = {"contains": ["yellow"], "words": [1, 1]}
    assert broken_rules(rules, prompt="?", answer="It is yellow") == ["words"]
    assert broken_rules(rules, prompt="?", answer="It is blue") == ["contains", "words"]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (["contains"], r"row 3: rules is not a mapping"),
        ({"contain": ["x"]}, r"row 3: there is no rule 'contain'; did you mean 'contains'"),
        ({"token_f1": "x"}, r"there is no rule 'token_f1'"),
        ({"exact_match": ""}, r"the rule exact_match has the value ''"),
        ({"contains": "x"}, r"row 3: the rule contains has the value 'x'"),
        ({"contains": []}, r"the rule contains has the value \[\]"),
        ({"regex": "("}, r"the rule regex has the value '\('"),
        ({"words": [3, 1]}, r"the rule words has the value \[3, 1\]"),
        ({"lines": [True, 1]}, r"the rule lines"),
        ({"refuses": "yes"}, r"the rule refuses has the value 'yes'"),
        ({"json": False}, r"the rule json has the value False"),
    ],
)
def test_wrong_rules_are_told(rules: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        check_rules(rules, where="row 3")


def test_scores_are_functions_of_prompt_answer_and_what_is_expected() -> None:
    assert RULES["token_f1"].score("Who?", "a red house", "the red car") == 0.5
    assert RULES["rouge_l"].score("Who?", "the red house", "the red car") == pytest.approx(2 / 3)
    assert RULES["exact_match"].score("Who?", "x", "x") is True


def test_a_regular_expression_that_takes_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_rules, "_SEARCH_SECONDS", 0.3)
    answer_rules._searcher.cache_clear()
    rules = check_rules({"regex": "^(a+)+$"}, where="here")
    with pytest.raises(DataError, match=r"the rule regex '\^\(a\+\)\+\$' takes more than 0\.3 seconds"):
        broken_rules(rules, prompt="", answer="a" * 60 + "!")
    assert broken_rules(rules, prompt="", answer="b") == ["regex"]
    assert broken_rules(rules, prompt="", answer="aa") == []
    answer_rules._searcher.cache_clear()


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "a{99999999999}", "a{2,1}"])
def test_a_regular_expression_that_cannot_be_compiled_is_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="the rule regex has the value"):
        check_rules({"regex": pattern}, where="here")
