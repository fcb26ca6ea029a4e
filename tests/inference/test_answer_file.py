from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gemma_tune.errors import DataError
from gemma_tune.inference.answer_file import AnswerFile

ROWS = [{"answer": f"Straße {number}"} for number in range(6)]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def left_by_a_kill(path: Path, lines: int, tail: str = "") -> None:
    file = AnswerFile(path, settings={"seed": 1}, window=2)
    file.write(ROWS[:lines])
    file._file.write(tail)
    file._file.close()


def test_it_bears_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, settings={}, window=2) as file:
        file.write(ROWS)
        assert not path.exists()
    assert read(path) == ROWS
    assert os.listdir(tmp_path) == ["answers.jsonl"]
    with pytest.raises(DataError, match=r"exists already, and is never overwritten"):
        AnswerFile(path, settings={}, window=2)


@pytest.mark.parametrize(("lines", "tail", "kept"), [(0, "", 0), (2, "", 2), (3, "", 2), (4, '{"ans', 4), (1, "{", 0)])
def test_whole_windows_stay(tmp_path: Path, lines: int, tail: str, kept: int) -> None:
    path = tmp_path / "answers.jsonl"
    left_by_a_kill(path, lines, tail)
    with AnswerFile(path, settings={"seed": 1}, window=2) as file:
        assert file.num_found == kept
        file.write(ROWS[kept:])
    assert read(path) == ROWS


def test_an_error_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt), AnswerFile(path, settings={"seed": 1}, window=2) as file:
        file.write(ROWS[:2])
        raise KeyboardInterrupt
    assert not path.exists()
    assert AnswerFile(path, settings={"seed": 1}, window=2).num_found == 2


def test_an_error_before_the_first_answer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), AnswerFile(tmp_path / "answers.jsonl", settings={}, window=2):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    left_by_a_kill(path, 2)
    with pytest.raises(DataError, match=r"made with other settings \(seed: 1, now 2\)"):
        AnswerFile(path, settings={"seed": 2}, window=2)
    with pytest.raises(DataError, match=r"there is no directory"):
        AnswerFile(tmp_path / "none" / "answers.jsonl", settings={}, window=2)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Files of the user's next to it, a file that takes its name in the meantime, and another process at work."""
    path = tmp_path / "answers.jsonl"
    for name, told in (("answers.jsonl.partial.json", "is in the way"), ("answers.jsonl.partial", "other settings")):
        for content in ('{"mine": 1}', "[1]", "text"):
            (tmp_path / name).write_text(content, encoding="utf-8")
            with pytest.raises(DataError, match=rf"{told}|is damaged"):
                AnswerFile(path, settings={"seed": 1}, window=2)
            assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text(encoding="utf-8") == content
            (tmp_path / name).unlink()
    with AnswerFile(path, settings={"seed": 1}, window=2) as file:
        file.write(ROWS[:2])
        with pytest.raises(DataError, match="another process is writing"):
            AnswerFile(path, settings={"seed": 1}, window=2)
    path.rename(tmp_path / "first.jsonl")
    with pytest.raises(DataError, match="in the meantime"), AnswerFile(path, settings={"seed": 1}, window=2) as file:
        file.write(ROWS[:2])
        path.write_text("mine", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "mine" and read(tmp_path / "answers.jsonl.partial") == ROWS[:2]
