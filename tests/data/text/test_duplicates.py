from __future__ import annotations

import random

import pytest

from gemma_tune.data.text.duplicates import NearDuplicates

WORDS = [f"word{number}" for number in range(3000)]


def _text(draw: random.Random, length: int) -> list[str]:
    return [draw.choice(WORDS) for _ in range(length)]


def _one_changed(draw: random.Random, words: list[str]) -> list[str]:
    changed = list(words)
    changed[draw.randrange(len(words))] = "another"
    return changed


def _find(rows: list[list[str]]) -> NearDuplicates:
    found = NearDuplicates(len(rows), read=rows.__getitem__)
    for row in rows:
        found.add(row)
    return found


def near_duplicate_groups(rows: list[list[str]]) -> list[list[int]]:
    return _find(rows).groups(range(len(rows)))


def near_pairs(rows: list[list[str]], others: list[list[str]]) -> list[tuple[int, int]]:
    both = range(len(rows) + len(others))
    pairs = _find(rows + others).pairs(both[: len(rows)], both[len(rows) :])
    return [(row, other - len(rows)) for row, other in pairs]


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


def test_a_row_of_one_text() -> None:
    assert near_duplicate_groups([["What is it?"], ["another thing"], ["what is it"]]) == [[0, 2]]


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


def test_groups_are_those_of_comparing_every_row_with_every_first() -> None:
    draw = random.Random(9)
    rows: list[list[str]] = []
    for number in range(500):
        words = " ".join(draw.choice(rows)).split() if number % 2 else _text(draw, draw.choice([3, 20, 60, 200]))
        for _ in range(draw.choice([0, 1, 1, 2, 8]) if number % 2 else 0):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        half = len(words) // 2
        rows.append([" ".join(words[:half]), " ".join(words[half:])])

    def ngrams(row: list[str]) -> set[tuple[str, ...]]:
        words = " ".join(row).split()
        return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}

    sets = [ngrams(row) for row in rows]
    groups: dict[int, list[int]] = {}
    firsts: list[int] = []
    for row, own in enumerate(sets):
        near = (first for first in firsts if len(own & sets[first]) >= 0.8 * len(own | sets[first]))
        first = next(near, None)
        if first is None:
            firsts.append(row)
        else:
            groups.setdefault(first, [first]).append(row)
    assert len(groups) > 50
    assert near_duplicate_groups(rows) == [groups[first] for first in sorted(groups)]
