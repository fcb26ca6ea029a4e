"""`gemma-tune init`: flags, questions, refusals; what it writes validates and trains."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from gemma_tune.cli.init import init
from gemma_tune.cli.recipes import read_header
from gemma_tune.errors import DataError, EngineError, GemmaTuneError, ModelError, RecipeError
from gemma_tune.flows import train as flow
from gemma_tune.paths import TINY_ROWS_DIR
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import SilentReporter

InitCommand = Callable[..., tuple[str, str]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> InitCommand:
    """Run `init` in an empty folder, without a card and without a terminal; returns stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(init)

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["init", *arguments])
        with pytest.raises(SystemExit) as ended:
            app()
        assert not ended.value.code
        out, err = capsys.readouterr()
        return out, err

    return run


def shipped_rows(path: Path, *, names: tuple[str, str]) -> None:
    """The first shipped rows as csv, under other column names."""
    lines = (TINY_ROWS_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows((row["instruction"], row["response"]) for row in map(json.loads, lines))


@pytest.mark.slow
def test_what_it_writes_validates_and_trains(command: InitCommand) -> None:
    shipped_rows(Path("faq.csv"), names=("Frage", "Antwort"))
    columns = ("--column", "instruction=Frage", "--column", "response=Antwort")
    out, _ = command("faq.csv", *columns, "--goal", "instruct", "--gpu", "none")
    assert out.rstrip() == Path("recipe.yaml").read_text(encoding="utf-8").rstrip()
    overrides = ["training.max_steps=3", "model.engine=transformers", "evaluation.num_questions=0"]
    loaded = load_recipe(Path("recipe.yaml"), overrides)
    assert loaded.recipe.model.name == "gemma-tiny"
    run = flow.train_run(loaded, reporter=SilentReporter())
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3]
    assert json.loads(run.data_report.read_text(encoding="utf-8"))["dropped_too_long"] == 0


def test_the_recipe_is_for_the_card(command: InitCommand) -> None:
    command("tiny-world", "--goal", "instruct", "--gpu", "t4", "--model", "gemma-7b", "-o", "t4.yaml")
    loaded = load_recipe(Path("t4.yaml"))
    assert (loaded.recipe.model.name, loaded.recipe.data.template) == ("gemma-7b", "dolly")
    goal, hardware = read_header(Path("t4.yaml"))
    assert "tiny-world" in goal and hardware.startswith("T4. Counted: ")
    assert "https://huggingface.co/google/gemma-7b" in loaded.text
    assert "gemma-tune train t4.yaml" in loaded.text
    command("tiny-world", "--goal", "chat", "--gpu", "GB=24", "-o", "chat.yaml")
    chat = load_recipe(Path("chat.yaml")).recipe
    assert chat.model.name.endswith("-it") and chat.data.template == "dolly-chat"


def test_nothing_is_overwritten_and_nothing_written_when_refused(command: InitCommand) -> None:
    Path("recipe.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe.yaml exists already"):
        command("tiny-world", "--yes")
    assert Path("recipe.yaml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "message", "hint"),
    [
        ((), DataError, r"init needs rows", "gemma-tune init rows.jsonl"),
        (("gone.csv", "--yes"), DataError, r"no such file: gone.csv", None),
        (("tiny-world",), RecipeError, r"no terminal; it needs --goal .* and --gpu", "--yes"),
        (("tiny-world", "--gpu", "t4"), RecipeError, r"it needs --goal chat, instruct or complete$", "--yes"),
        (
            ("sides.csv", "--yes"),
            DataError,
            r"no column is clearly the instruction or the response\n  left    text .*\n  middle  text ",
            "say which: gemma-tune init sides.csv --yes --column instruction=COLUMN --column response=COLUMN",
        ),
        (
            ("sides.csv", "--yes", "--column", "instruction=left"),
            DataError,
            r"no column is clearly the response\n",
            "say which: gemma-tune init sides.csv --yes --column instruction=left --column response=COLUMN",
        ),
        (
            ("faq.csv", "--yes", "--column", "instruction=frage", "--column", "response=Antwort"),
            DataError,
            r"has no column 'frage'; did you mean 'Frage'\?",
            "its columns: Frage, Antwort",
        ),
        (("faq.csv", "--column", "Frage"), RecipeError, r"--column Frage: not FIELD=COLUMN", "instruction=question"),
        (
            ("tiny-world", "--yes", "--goal", "complete"),
            DataError,
            r"no column is clearly the text\n  instruction  text of about",
            "they fit --goal instruct; or map them: --column text=COLUMN",
        ),
        (("tiny-world", "--yes", "--gpu", "t5"), EngineError, r"no card is known by the name 't5'", "known: t4"),
        (("tiny-world", "--yes", "--model", "gemma-9x"), ModelError, r"no Gemma is known", "models list"),
        (
            ("tiny-world", "--yes", "--goal", "chat", "--model", "gemma-7b"),
            ModelError,
            r"gemma-7b is a base model",
            "--goal instruct",
        ),
        (
            ("tiny-world", "--yes", "--goal", "instruct", "--model", "gemma-7b-it"),
            ModelError,
            r"has learned chat turns",
            "--goal chat",
        ),
        (
            ("tiny-world", "--yes", "--gpu", "GB=4", "--model", "gemma-7b"),
            EngineError,
            r"gemma-7b does not fit on 4 GB card",
            "without --model",
        ),
        (
            ("tiny-world", "--yes", "--gpu", "GB=1"),
            EngineError,
            r"no Gemma fits on 1 GB card with these rows",
            "--gpu none",
        ),
    ],
)
def test_refusals_say_what_to_do(
    command: InitCommand, arguments: tuple[str, ...], error: type[GemmaTuneError], message: str, hint: str | None
) -> None:
    shipped_rows(Path("faq.csv"), names=("Frage", "Antwort"))
    sides = [f"one more sentence {index},number {index} of it,and its third part {index}\n" for index in range(9)]
    Path("sides.csv").write_text("left,middle,right\n" + "".join(sides), encoding="utf-8")
    with pytest.raises(error, match=message) as refused:
        command(*arguments)
    assert hint is None or hint in (refused.value.hint or "")
    assert not Path("recipe.yaml").exists()


def test_yes_takes_columns_that_it_can_guess(command: InitCommand) -> None:
    shipped_rows(Path("faq.csv"), names=("Question", "Answer"))
    command("faq.csv", "--yes")
    assert load_recipe(Path("recipe.yaml")).recipe.data.columns == {"instruction": "Question", "response": "Answer"}


def test_a_tight_card_is_told(command: InitCommand) -> None:
    _, err = command("tiny-world", "--yes", "--gpu", "GB=7.2", "--model", "gemma-7b")
    assert "! plan: tight: needs" in err


def test_a_tuned_model_sets_the_goal(command: InitCommand) -> None:
    command("tiny-world", "--yes", "--model", "gemma-3-1b-it", "--gpu", "t4")
    assert load_recipe(Path("recipe.yaml")).recipe.data.template == "dolly-chat"


def _in_a_terminal(folder: Path, answers: str, *arguments: str) -> tuple[int, str]:
    """Run `init` on a terminal of its own and type the answers; returns the exit code and the screen."""
    program = (
        "import typer\nfrom gemma_tune.cli import app\nfrom gemma_tune.cli.init import init\n"
        "app.app.command('init')(init)\napp.main()\n"
    )
    control, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, "init", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(folder), "TERM": "dumb", "COLUMNS": "200"},
        stdin=screen,
        stdout=screen,
        stderr=screen,
    )
    os.close(screen)
    os.write(control, answers.encode())
    told = b""
    while True:
        try:
            piece = os.read(control, 4096)
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not piece:
            break
        told += piece
    os.close(control)
    return process.wait(timeout=60), told.decode()


def test_it_asks_on_a_terminal_and_asks_again_after_a_mistake(tmp_path: Path) -> None:
    shipped_rows(tmp_path / "faq.csv", names=("Frage", "Antwort"))
    answers = ["gone.csv", "faq.csv", "", "Frag", "Frage", "", "t5", "l4", "gemma-2b"]
    code, screen = _in_a_terminal(tmp_path, "".join(f"{answer}\n" for answer in answers))
    assert code == 0, screen
    assert "no such file: gone.csv" in screen
    assert "'Frag' is none of Frage, Antwort" in screen
    assert "no card is known by the name 't5'" in screen
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert recipe.data.columns == {"instruction": "Frage", "response": "Antwort"}
    assert recipe.model.name == "gemma-2b"
    assert "L4" in read_header(tmp_path / "recipe.yaml")[1]


def test_an_end_of_input_ends_it(tmp_path: Path) -> None:
    code, screen = _in_a_terminal(tmp_path, "\x04")
    assert code == 2
    assert "no answer, so nothing was written" in screen
    assert not list(tmp_path.iterdir())
