"""`gemma-tune compare`: what arrives, what is printed, and a person at the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from gemma_tune.cli.compare import compare
from gemma_tune.data.rows.template import load_template
from gemma_tune.errors import DataError
from gemma_tune.evaluation import compare as comparing
from gemma_tune.inference.target import GgufTarget
from tests.evaluation.fake_judge import serve_judge

PROMPTS = [
    {"prompt": "What does a baker make?", "id": "baker", "rules": {"contains": ["bread"]}, "category": "trades"},
    {"prompt": "And a smith?", "id": "smith", "category": "trades", "reference": "Horseshoes."},
    {"prompt": "Is ice warm?", "id": "ice", "rules": {"contains": ["no"]}, "category": "facts"},
]
ANSWERS = {"good": ["Bread.", "Horseshoes.", "No."], "bad": ["Shoes.", "<script>alert(1)</script>", "No."]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models whose answers are known, and three prompts."""
    monkeypatch.chdir(tmp_path)
    for name in (*ANSWERS, "other"):
        (tmp_path / f"{name}.gguf").write_bytes(b"weights")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")

    def find(name: str, **_: Any) -> GgufTarget:
        return GgufTarget(tmp_path / f"{name}.gguf", load_template("chat"))

    def answer(target: GgufTarget, questions: Any, *, file: Any, **_: Any) -> None:
        answers = ANSWERS.get(target.path.stem, ANSWERS["bad"])
        file.write({**row, "answer": text} for row, text in zip(questions.rows, answers, strict=True))

    monkeypatch.setattr(comparing, "find_target", find)
    monkeypatch.setattr(comparing, "answer_questions", answer)
    return tmp_path


def run(*arguments: str, stdin: str = "") -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compare)
    return CliRunner().invoke(app, list(arguments), input=stdin)


@pytest.fixture
def lines() -> Callable[..., list[str]]:
    def of(*arguments: str, stdin: str = "") -> list[str]:
        done = run(*arguments, stdin=stdin)
        assert done.exit_code == 0, done.exception
        return [" ".join(line.split()) for line in done.stdout.splitlines()]

    return of


def test_rules_and_the_page(lines: Callable[..., list[str]], folder: Path) -> None:
    printed = lines("good", "bad", "--file", "mine.jsonl")
    assert "all 2 100.0 % [34.2, 100.0] 50.0 % [9.5, 90.5]" in printed
    assert any(line.startswith("good against bad 1 1 0 75.0 % [") for line in printed)
    assert "trades 1 0 0 100.0 % [20.7, 100.0]" not in printed  # one prompt has no interval
    assert "trades 1 0 0 100.0 %" in printed
    page = (folder / "comparisons" / "good-vs-bad-mine" / "comparison.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_judge_at_an_address(lines: Callable[..., list[str]], folder: Path) -> None:
    with serve_judge(lambda _: "VERDICT: A") as endpoint:
        printed = lines(
            "good", "bad", "-f", "mine.jsonl", "--judge", endpoint.url, "--judge-model", "m", "--output", "out"
        )
    assert any(line.startswith("good against bad 0 3 0 50.0 % [") for line in printed)
    assert any(
        line.startswith("6 of 6 duels judged; the answer shown first was preferred in 100.0 %") for line in printed
    )
    assert len(endpoint.prompts) == 4  # both gave the same answer to the third prompt
    stored = [path.name for path in sorted((folder / "out").iterdir())]
    assert stored[:4] == ["answers-1.jsonl", "answers-2.jsonl", "comparison.html", "comparison.json"]
    assert stored[4].startswith("judgments-model-") and len(stored) == 5


def test_three_models_and_json() -> None:
    done = run("bad", "good", "other", "-f", "mine.jsonl", "--json")
    found = json.loads(done.stdout)
    assert found["ratings"][0]["label"] == "good"
    assert found["labels"] == ["bad", "good", "other"] and len(found["questions"]) == 3
    assert found["questions"][1]["reference"] == "Horseshoes."


def test_a_person_quits_and_goes_on(lines: Callable[..., list[str]]) -> None:
    """The sides are mixed, so the good answer is looked for; nothing on the screen names a model."""
    person = ("good", "bad", "-f", "mine.jsonl", "--judge", "person", "-o", "out")
    done = run(*person, stdin="x\n\nq\n")
    assert done.exit_code == 0
    assert done.stderr.count("Which is better?") == 3  # two answers were none
    shown = done.stderr.split("── answer 1 ──")[1].split("Which")[0]
    assert {"Bread.", "Shoes."} <= set(shown.split()) and "good" not in shown and "bad" not in shown
    printed = " ".join(done.stdout.split())
    assert "1 of 3 duels judged" in printed  # the equal answers
    assert "the same command resumes with the pairs that are not judged yet" in done.stderr
    choice = "1" if shown.index("Bread.") < shown.index("Shoes.") else "2"
    again = lines(*person, stdin=f"{choice}\nt\n")
    assert "good against bad 1 2 0 66.7 % [20.8, 93.9]" in again
    assert any(line.startswith("3 of 3 duels judged") for line in again)


def test_the_end_of_stdin_is_quit(lines: Callable[..., list[str]]) -> None:
    printed = lines("good", "bad", "-f", "mine.jsonl", "--judge", "person")
    assert any(line.startswith("1 of 3 duels judged") for line in printed)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("good",), r"nothing to compare with"),
        (("good", "bad", "--sets", "safety", "-f", "mine.jsonl"), r"either --sets or --file"),
        (("good", "bad", "--sets", "safty"), r"did you mean 'safety'"),
        (("good", "bad", "--judge", "http://127.0.0.1:1/v1"), r"needs --judge-model"),
        (("good", "bad", "--judge", "person", "--judge-model", "m"), r"takes no --judge-model"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], told: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, DataError)
    with pytest.raises(DataError, match=told):
        raise done.exception
