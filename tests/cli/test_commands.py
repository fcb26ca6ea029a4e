"""What the commands print: results on stdout, messages on stderr, JSON for programs, no colour in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from gemma_tune.cli.app import main
from gemma_tune.models.registry import MODELS
from gemma_tune.paths import RECIPES_DIR
from gemma_tune.recipe.load import load_recipe

Gemma = Callable[..., tuple[str, str]]


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Gemma:
    """Run a command in an empty folder; returns stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["gemma-tune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        return out, err

    return command


def test_validate_prints_a_recipe_that_is_the_same_recipe(gemma: Gemma) -> None:
    out, err = gemma("validate", "gemma-7b-dolly", "lora.rank=8")
    Path("printed.yaml").write_text(out, encoding="utf-8")
    assert load_recipe(Path("printed.yaml")).recipe == load_recipe(Path("gemma-7b-dolly"), ["lora.rank=8"]).recipe
    assert "is valid" in err
    as_json, _ = gemma("validate", "gemma-7b-dolly", "lora.rank=8", "--json")
    assert json.loads(as_json)["lora"]["rank"] == 8


def test_recipes(gemma: Gemma) -> None:
    out, _ = gemma("recipes", "list")
    names = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
    assert all(name in out for name in names)
    listed = json.loads(gemma("recipes", "list", "--json")[0])
    assert sorted(row["name"] for row in listed) == names
    assert all(row["goal"] and row["hardware"] for row in listed)
    assert gemma("recipes", "show", "quickstart")[0] == (RECIPES_DIR / "quickstart.yaml").read_text(encoding="utf-8")
    gemma("recipes", "copy", "quickstart")
    assert load_recipe(Path("quickstart.yaml")).recipe == load_recipe(RECIPES_DIR / "quickstart.yaml").recipe
    _, err = gemma("recipes", "copy", "quickstart", code=2)
    assert "exists already" in err


def test_the_json_schema_accepts_the_shipped_recipes_and_refuses_a_wrong_one(gemma: Gemma) -> None:
    schema = json.loads(gemma("recipes", "schema")[0])
    validator = jsonschema.Draft202012Validator(schema)
    for path in RECIPES_DIR.glob("*.yaml"):
        validator.validate(load_recipe(path).recipe.model_dump(mode="json"))
    errors = list(validator.iter_errors({"data": {"source": "x", "max_seq_tokens": 64}, "lora": {"rnak": 3}}))
    assert len(errors) == 1


def test_models(gemma: Gemma) -> None:
    out, _ = gemma("models", "list")
    assert all(name in out for name in MODELS)
    assert {row["name"] for row in json.loads(gemma("models", "list", "--json")[0])} == set(MODELS)
    out, _ = gemma("models", "show", "gemma_2b_en")
    assert "2,506,172,416" in out
    assert "multi-query" in out
    shown = json.loads(gemma("models", "show", "gemma-7b", "--json", "--modules")[0])
    assert sum(row["num_params"] for row in shown["layers"]) == 8_537_680_896
    _, err = gemma("models", "show", "gemma-9x", code=2)
    assert "gemma-tune models list" in err


def test_data_shows_counts_and_one_marked_row(gemma: Gemma) -> None:
    out, _ = gemma("data", "quickstart")
    assert "<bos>### Instruction:\n" in out
    assert "⟦" in out and "<eos>⟧" in out
    report = json.loads(gemma("data", "quickstart", "--json")[0])
    assert report["train_rows"] >= 800
    assert report["dropped_too_long"] == 0


def test_generate_answers_each_question_in_order(gemma: Gemma) -> None:
    questions = ["The town of Ostel", "A goat", "One plus one"]
    prompts = [word for question in questions for word in ("--prompt", question)]
    arguments = ("generate", "gemma-tiny", "--template", "dolly", "--max-new-tokens", "6")
    lines = gemma(*arguments, *prompts, "--json")[0].splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == questions
    rows = Path("questions.jsonl")
    rows.write_text("".join(json.dumps({"instruction": question}) + "\n" for question in questions), encoding="utf-8")
    from_file = gemma(*arguments, "--file", str(rows), "--json")[0].splitlines()
    answers = [[json.loads(line)["answer"] for line in found] for found in (lines, from_file)]
    assert answers[0] == answers[1]
    _, err = gemma("generate", "gemma-tiny", "--prompt", "x", code=2)
    assert "--template" in err
    _, err = gemma("generate", "gemma-tiny", code=2)
    assert "either --prompt or --file" in err
