"""A commented recipe reads back as what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gemma_tune.errors import RecipeError
from gemma_tune.recipe.commented import Setting, format_recipe, write_new
from gemma_tune.recipe.load import load_recipe

SETTINGS = (
    Setting("training.epochs", 3.0, "few rows"),
    Setting("training.gradient_checkpointing", "off"),
    Setting("training.learning_rate", 1e-5),
    Setting("data.source", "my rows/täg: #1.jsonl", "mine"),
    Setting("data.columns", {"instruction": "Was?", "response": "no"}),
    Setting("data.max_seq_tokens", 512),
    Setting("evaluation.exact_match", False),
)


def test_it_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_new(path, format_recipe({"Goal": "try " * 60, "Hardware": "none"}, SETTINGS))
    recipe = load_recipe(path).recipe
    assert recipe.data.source == "my rows/täg: #1.jsonl"
    assert recipe.data.columns == {"instruction": "Was?", "response": "no"}
    assert (recipe.training.epochs, recipe.training.learning_rate) == (3, 1e-5)
    assert recipe.training.gradient_checkpointing == "off"
    assert not recipe.evaluation.exact_match
    lines = path.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 79
    assert [line for line in lines if line.endswith(":")] == ["data:", "training:", "evaluation:"]
    assert next(line for line in lines if "epochs" in line).endswith("# few rows")
    assert all(line.startswith("#           try") for line in lines[1:3])


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_survives(text: str) -> None:
    written = format_recipe(
        {"Goal": "g"}, [Setting("data.source", text, "a reason"), Setting("data.columns", {text: text})]
    )
    data = YAML(typ="safe", pure=True).load(written)["data"]
    assert data["source"] == text
    assert data["columns"] == {text: text}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"exists already"):
        write_new(path, "other")
    assert path.read_text(encoding="utf-8") == "mine"
    with pytest.raises(RecipeError, match=r"cannot write"):
        write_new(tmp_path / "missing" / "x.yaml", "other")
