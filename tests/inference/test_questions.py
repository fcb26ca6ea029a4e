from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from gemma_tune.data.rows.template import load_template
from gemma_tune.errors import DataError
from gemma_tune.inference.questions import questions_of, read_questions, read_stdin_question


def test_the_same_questions_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["What is 2 + 2?", "Wer bäckt Brot? 🥖"]
    for template_name in ("dolly", "chat", "completion", "dolly-chat"):
        template = load_template(template_name)
        wanted = questions_of(template, asked).rows
        (tmp_path / "q.txt").write_text("\ufeff" + "\n\n".join(asked) + "\n", encoding="utf-8")
        assert read_questions(template, str(tmp_path / "q.txt")).rows == wanted
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wanted)
        (tmp_path / "q.jsonl").write_text(rows, encoding="utf-8")
        assert read_questions(template, str(tmp_path / "q.jsonl")).rows == wanted
        for text in ("\n".join(asked), rows):
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))
            assert read_questions(template, "-").rows == wanted
        bare = "".join(json.dumps({"prompt": question, "id": 3}) + "\n" for question in asked)
        (tmp_path / "bare.jsonl").write_text(bare, encoding="utf-8")
        read = read_questions(template, str(tmp_path / "bare.jsonl")).rows
        assert [{**row, "prompt": None, "id": 3} for row in read] == [
            {**row, "prompt": None, "id": 3} for row in wanted
        ]


def test_a_column_of_the_template_wins_over_prompt(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"instruction": "A", "prompt": "B"}\n', encoding="utf-8")
    assert read_questions(load_template("dolly"), str(tmp_path / "q.jsonl")).rows[0]["instruction"] == "A"


def test_what_cannot_be_asked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dolly = load_template("dolly")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    for name, told in (("empty.txt", r"empty.txt is empty"), ("latin.txt", r"not UTF-8"), ("no.txt", r"No such file")):
        with pytest.raises(DataError, match=told):
            read_questions(dolly, str(tmp_path / name))
    monkeypatch.setattr(sys, "stdin", io.StringIO('fine\n{"instruction": \n'))
    with pytest.raises(DataError, match=r"stdin, question 2: broken JSON"):
        read_questions(dolly, "-")
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    with pytest.raises(DataError, match=r"nothing is asked"):
        read_stdin_question()
    with pytest.raises(DataError, match=r"completion has no context"):
        questions_of(load_template("completion"), ["x"], context="y")
    assert questions_of(dolly, ["x"], context="y").rows == ({"instruction": "x", "context": "y"},)
