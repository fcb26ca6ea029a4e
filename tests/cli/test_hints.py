"""Every command, option, setting and install that package, templates and documents name exists as typed."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from gemma_tune.cli.app import app
from gemma_tune.cli.report import report
from gemma_tune.recipe.keys import field_at
from gemma_tune.recipe.schema import Recipe
from tests.reporting.made_runs import make_run_in

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = typer.main.get_command(app)
# What follows the package's name in a sentence.
WORDS = set(str.split("that does did knows in and runs trains unless cannot itself split finishes gets from wrote"))
_NAMED = re.compile(r"gemma-tune (?P<words>[a-z][a-z-]*(?: [a-z|-]+)?)(?P<rest>[^`\n;]*)")


def _texts() -> Iterator[tuple[str, str, bool]]:
    """Place and text of every string, and whether it is (a part of) a hint."""
    for path in sorted((ROOT / "gemma_tune").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        hints = {
            id(inner)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            for keyword in call.keywords
            if keyword.arg == "hint"
            for inner in ast.walk(keyword.value)
        }
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inside = docstrings | {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            else:
                continue
            yield f"{path.relative_to(ROOT)}:{node.lineno}", text, id(node) in hints
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.yaml")]
    for path in [*documents, *(ROOT / "gemma_tune").rglob("*.j2")]:
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), False
    for path in (ROOT / "gemma_tune").rglob("*.toml"):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), True


TEXTS = list(_texts())


def test_every_command_and_option_that_is_named_exists() -> None:
    wrong, num_seen = [], 0
    for where, text, _ in TEXTS:
        for found in _NAMED.finditer(text):
            first, _, second = found["words"].partition(" ")
            command = COMMANDS.commands.get(first)  # type: ignore[attr-defined]
            if command is None:
                wrong += [(where, found[0])] if first not in WORDS else []
                continue
            num_seen += 1
            if hasattr(command, "commands"):
                names = second.split("|")
                if not set(names) <= set(command.commands):
                    wrong.append((where, found[0]))
                    continue
                command = command.commands[names[0]]
            options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
            rest = re.split(r"\. |, |  #| \(|\)|\"", second + found["rest"])[0]
            wrong += [(where, found[0]) for name in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest) if name not in options]
    assert wrong == [] and num_seen > 100


def test_every_setting_that_a_hint_names_is_in_the_recipe() -> None:
    named = re.compile(rf"(?<![\w./-])(?:{'|'.join(Recipe.model_fields)})\.[a-z0-9_.]*[a-z0-9_](?![\w(])")
    wrong, num_seen = [], 0
    for where, text, is_hint in TEXTS:
        for key in named.findall(text) if is_hint else re.findall(rf"{named.pattern}(?==[^=])", text):
            num_seen += 1
            # Names in data.columns are those of a template; one is a file, and one a mistake that is shown.
            if key.startswith("data.columns.") or key in ("export.json", "training.learning_rat"):
                continue
            if field_at(Recipe, key.split(".")) is None:
                wrong.append((where, key))
    assert wrong == [] and num_seen > 30


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    pins = {re.split(r"[=<>\[]", one)[0]: one for extra in EXTRAS.values() for one in extra}
    for where, text, _ in TEXTS:
        assert "pip install gemma-tune" not in text and "pip install 'gemma-tune" not in text, where
        for extras in re.findall(r"pip install '\.\[([^]]+)\]'", text):
            assert set(extras.split(",")) <= set(EXTRAS), where
        for requirement in re.findall(r"(?<=pip install )'([^']+)'", text):
            name = re.split(r"[=<>\[]", requirement)[0]
            assert name not in pins or requirement == pins[name], where


def test_a_name_in_a_command_is_one_word_of_it() -> None:
    """Paths may hold blanks."""
    wrong = []
    for path in sorted((ROOT / "gemma_tune").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for before, value in itertools.pairwise(parts):
                if isinstance(before, ast.Constant) and re.search(r"gemma-tune [a-z ]+$", str(before.value)):
                    told = ast.unparse(value).strip("f'")[1:-1]
                    is_word = told.startswith("in_shell(") or f"{told} = in_shell(" in source
                    wrong += [] if is_word else [f"{path.name}:{node.lineno}: {told}"]
    # A seed, a handle, the name of a model, and a template that is filled later.
    assert {each.partition(":")[0] for each in wrong} <= {"divide.py", "worker.py", "random_model.py"}


def test_the_commands_after_a_run_work_in_a_folder_with_blanks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my runs").mkdir()
    run = make_run_in(tmp_path / "my runs")
    report([run.path])
    out = re.sub(r" +", " ", capsys.readouterr().out)
    lines = [line.partition("gemma-tune ")[2].strip() for line in out.splitlines() if "gemma-tune " in line]
    assert lines and all(str(run.path) in shlex.split(line) for line in lines)
