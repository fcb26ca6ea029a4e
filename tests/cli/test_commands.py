"""What the commands print: results on stdout, messages on stderr, JSON for programs, no colour in a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from gemma_tune.models.catalogue import MODELS
from gemma_tune.paths import RECIPES_DIR
from gemma_tune.recipe.load import load_recipe

Gemma = Callable[..., tuple[str, str]]


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


def test_data_preview_shows_counts_and_marked_rows(gemma: Gemma) -> None:
    out, _ = gemma("data", "preview", "quickstart", "--rows", "2")
    assert out.count("<bos>### Instruction:\n") == 2
    assert "⟦" in out and "<eos>⟧" in out
    shown = json.loads(gemma("data", "preview", "quickstart", "--json", "--side", "eval", "--rows", "1")[0])
    assert shown["report"]["train_rows"] >= 800
    assert shown["report"]["dropped_too_long"] == 0
    (row,) = shown["rows"]
    assert row["num_tokens"] == len(row["tokens"])
    assert row["num_supervised"] == sum(token["trained"] for token in row["tokens"])
    assert [token["id"] for token in row["tokens"] if token["control"]] == [2, 1]
    at = json.loads(gemma("data", "preview", "quickstart", "--json", "--side", "eval", "--at", row["where"])[0])
    assert at["rows"] == [row]
    _, err = gemma("data", "preview", "quickstart", "--at", "train.jsonl:99999", code=2)
    assert "no train row stands at" in err


def test_data_preview_and_audit_take_a_bare_file_of_rows(gemma: Gemma) -> None:
    rows = [{"prompt": f"Number {n}?", "completion": f" {n}."} for n in range(20)]
    rows += [rows[0], {"prompt": "Mail?", "completion": " Write to ann@example.org or call."}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, _ = gemma("data", "preview", "rows.jsonl")
    assert "template completion (detected)" in out
    out, _ = gemma("data", "audit", "rows.jsonl", "--html", "audit.html")
    assert "exact" in out and "ann@example.org" not in out
    assert "ann@example.org" not in Path("audit.html").read_text(encoding="utf-8")
    report = json.loads(gemma("data", "audit", "rows.jsonl", "--json", "--fail-on", "warning", code=1)[0])
    kinds = {finding["kind"] for finding in report["findings"]}
    assert any("duplicate" in kind for kind in kinds) and any("mail" in kind for kind in kinds)
    gemma("data", "audit", "rows.jsonl", "--fail-on", "error")
    _, err = gemma("data", "audit", "rows.jsonl", "--fail-on", "eror", code=2)
    assert "--fail-on" in err


def test_the_token_cache_is_used_and_cleared(gemma: Gemma, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    gemma("data", "preview", "quickstart")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    _, err = gemma("data", "clear-cache")
    assert "removed 1 entries" in err
    assert not list((tmp_path / "cache" / "tokens").iterdir())


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
    _, err = gemma("generate", "gemma-tiny", "--prompt", "x", "--file", "y.txt", code=2)
    assert "either --prompt or --file" in err
