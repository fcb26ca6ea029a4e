from __future__ import annotations

import random

import pytest

from gemma_tune.data.text.duplicates import exact_groups, near_duplicate_groups, near_pairs

WORDS = [f"word{number}" for number in range(3000)]


def _text(draw: random.Random, length: int) -> list[str]:
    return [draw.choice(WORDS) for _ in range(length)]


def _one_changed(draw: random.Random, words: list[str]) -> list[str]:
    changed = list(words)
    changed[draw.randrange(len(words))] = "another"
    return changed


def test_exact_groups_keep_order() -> None:
    assert exact_groups(["b", "a", "b", "c", "a", "b"]) == [[0, 2, 5], [1, 4]]


def test_one_word_of_fifty_is_always_found() -> None:
    draw = random.Random(7)
    originals = [_text(draw, 50) for _ in range(600)]
    rows = [[" ".join(words)] for words in originals]
    rows += [[" ".join(_one_changed(draw, words))] for words in originals]
    assert near_duplicate_groups(rows) == [[index, 600 + index] for index in range(600)]


def test_case_punctuation_and_space_do_not_count() -> None:
    assert near_duplicate_groups(
        [["What is it?", "A duck."], ["what  is it", "a DUCK"], ["What was it?", "A duck."]]
    ) == [[0, 1]]


@pytest.mark.parametrize(
    "rows",
    [
        [["What is 3 + 4?", "7"], ["What is 3 + 5?", "8"]],
        [["Name a bird.", "Duck"], ["Name a bird.", "Goose"]],
        [["Yes"], ["No"]],
        [["..."], ["!!!"], [""]],
        [["one two"], ["two one"]],
    ],
    ids=["sum", "answer", "word", "no words", "order"],
)
def test_short_rows_are_told_apart(rows: list[list[str]]) -> None:
    assert near_duplicate_groups(rows) == []


def test_questions_about_one_passage_are_different_rows() -> None:
    passage = " ".join(_text(random.Random(1), 300))
    rows = [
        ["Who founded the town?", passage, "A baker named Elsie founded it."],
        ["How long does the river run?", passage, "For nine miles."],
    ]
    assert near_duplicate_groups(rows) == []


def test_missing_and_empty_fields_are_the_same() -> None:
    assert near_duplicate_groups([["Who is it?", "", "Me."], ["Who is it?", "Me."]]) == [[0, 1]]


def test_first_of_each_group_is_kept_and_no_chain_is_followed() -> None:
    draw = random.Random(3)
    words = _text(draw, 50)
    near, far = list(words), list(words)
    near[10] = "x"
    far[10], far[30], far[40] = "x", "y", "z"
    rows = [[" ".join(words)], [" ".join(near)], [" ".join(far)]]
    # The third row is near to the second, which is dropped, and not to the first.
    assert near_duplicate_groups(rows) == [[0, 1]]
    assert near_duplicate_groups(rows) == near_duplicate_groups(rows)


def test_a_row_may_be_one_text() -> None:
    assert near_duplicate_groups(["What is it?", "another thing", "what is it"]) == [[0, 2]]


def test_text_without_blanks() -> None:
    text = "日本語の文章は単語の間に空白を置かないので一文字を一語として数えることにします。" * 2
    other = text[:20] + "犬" + text[21:]
    assert near_duplicate_groups([[text], [other], ["まったく違う文章です。"]]) == [[0, 1]]


def test_pairs_name_the_first_partner() -> None:
    draw = random.Random(5)
    texts = [_text(draw, 60) for _ in range(4)]
    asked = [[" ".join(_one_changed(draw, texts[2]))], [" ".join(_text(draw, 60))], [" ".join(texts[0])]]
    others = [[" ".join(words)] for words in (*texts, texts[0])]
    assert near_pairs(asked, others) == [(0, 2), (2, 0)]


def test_ten_thousand_equal_rows_take_no_time() -> None:
    groups = near_duplicate_groups([["the same words again and again"]] * 5000)
    assert groups == [list(range(5000))]


def test_progress_ends_at_the_total() -> None:
    told: list[tuple[int, int]] = []
    near_duplicate_groups([["a b c"]] * 1200, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(500, 1200), (1000, 1200), (1200, 1200)]
