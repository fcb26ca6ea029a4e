from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import DataError
from gemma_tune.inference import load_target as load_module
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.ask import Answered, Listener, answer_questions, open_answer_file
from gemma_tune.inference.load_target import LoadedTarget
from gemma_tune.inference.questions import questions_of
from gemma_tune.inference.sampling import choose_sampling
from gemma_tune.inference.target import Target, find_target

WORDS = ("The town", "A goat", "One plus one", "Once upon a time a", "In", "A baker needs", "Ida", "Who lives in", "No")


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch, tiny: LoadedTarget) -> Target:
    """gemma-tiny, loaded once for all tests."""
    monkeypatch.setattr(load_module, "load_target", lambda target: tiny)
    found = find_target("gemma-tiny", template="completion")
    assert isinstance(found, Target)
    return found


@pytest.mark.parametrize("asked", [{}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "drawn"])
def test_a_killed_file_goes_on_to_the_same_bytes(target: Target, tmp_path: Path, asked: dict[str, Any]) -> None:
    settings = AnswerSettings(sampling=choose_sampling(**asked), max_new_tokens=6, batch_size=1)
    questions = questions_of(target.template, WORDS)
    assert len(WORDS) > 2 * settings.window

    def answer(path: Path, *, stop_after: int = 99) -> list[int]:
        seen: list[int] = []

        def count(answers: list[Answered]) -> None:
            seen.append(len(answers))
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        with open_answer_file(path, target, questions, settings=settings) as file:
            answer_questions(target, questions, settings=settings, file=file, listener=Listener(on_answers=count))
        return seen

    assert answer(tmp_path / "whole.jsonl") == [4, 4, 1]
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path / "killed.jsonl", stop_after=1)
    assert answer(tmp_path / "killed.jsonl") == [4, 1]
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_come_with_their_rows_and_the_speed(target: Target) -> None:
    questions = questions_of(target.template, WORDS[:3])
    got: list[Answered] = []
    progress: list[tuple[int, int]] = []
    settings = AnswerSettings(max_new_tokens=5, batch_size=2)
    speed = answer_questions(
        target,
        questions,
        settings=settings,
        listener=Listener(on_answers=got.extend, on_progress=lambda *each: progress.append(each)),
    )
    assert [answer.row for answer in got] == list(questions.rows)
    assert got[0].to_json().keys() == {"prompt", "answer", "num_tokens", "stopped"}
    assert speed.num_tokens == sum(answer.completion.num_tokens for answer in got)
    assert re.fullmatch(r"3 answers, \d+ tokens in \d+\.\d s \([\d,]+ tokens/s\)", str(speed))
    assert progress == [(2, 3), (3, 3)]
    kept = Answered({"prompt": "x", "answer": "gold"}, got[0].completion).to_json()
    assert (kept["given_answer"], kept["answer"]) == ("gold", got[0].completion.text)


def test_a_row_that_cannot_be_asked_is_numbered(target: Target) -> None:
    questions = questions_of(target.template, WORDS[:2])
    broken = type(questions)((*questions.rows, {"prompt": {"a": 3}}), "")
    with pytest.raises(DataError, match=r"question 3: prompt is dict"):
        answer_questions(target, broken, settings=AnswerSettings())


@pytest.mark.parametrize(
    "wrong", [{"max_length": 0}, {"batch_size": 0}, {"max_new_tokens": -1}, {"stop_strings": ("",)}]
)
def test_settings_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        AnswerSettings(**wrong)


def test_the_longest_answer() -> None:
    assert AnswerSettings().longest_answer == 256
    assert AnswerSettings(max_length=999).longest_answer == 999
    assert AnswerSettings(max_length=999, max_new_tokens=5).longest_answer == 5
