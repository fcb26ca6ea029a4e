"""The `method` of a recipe: a word or a mapping, and what follows from the facts of the method that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_tune.errors import RecipeError
from gemma_tune.recipe.load import dump_recipe, load_recipe
from gemma_tune.recipe.methods import METHODS
from gemma_tune.recipe.schema import Recipe

QUICKSTART = Path("quickstart")


@pytest.fixture
def pairs() -> Iterator[None]:
    """A method of two sequences a row, with a learning rate of its own."""
    METHODS.add(replace(METHODS["sft"], name="pairs", rows="pair", sequences_per_row=2, default_learning_rate=5e-6))
    yield
    METHODS.remove("pairs")


@pytest.mark.parametrize("method", ["", "method: sft\n", "method: {name: sft}\n", "method:\n"])
def test_a_word_and_a_mapping_say_the_same(method: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{method}data: {{source: rows.jsonl, max_seq_tokens: 64}}\n", encoding="utf-8")
    recipe = load_recipe(path).recipe
    assert recipe.method.name == "sft"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again).recipe == recipe


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method=dpoo", "method.name: must be one of 'sft', found 'dpoo'"),
        ("method=[sft]", "method: must be the name of a method, or a mapping with its name"),
        ("method={name: [sft]}", "method.name: must be one of 'sft'"),
        ("method.beta=0.1", "method: beta is unknown, and the method sft has: name"),
    ],
)
def test_another_method_or_key_is_answered_in_a_sentence(override: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, [override, "lora.rank=0"])
    assert told in caught.value.message and "lora.rank" in caught.value.message


def test_a_method_brings_its_learning_rate(pairs: None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: pairs\ndata: {source: rows.jsonl, max_seq_tokens: 64}\n", encoding="utf-8")
    assert load_recipe(path).recipe.training.learning_rate == 5e-6
    assert load_recipe(path, ["training.learning_rate=1e-3"]).recipe.training.learning_rate == 1e-3
    assert load_recipe(path, ["method=sft"]).recipe == Recipe.model_validate(
        {"data": {"source": "rows.jsonl", "max_seq_tokens": 64}}
    )


def test_rows_of_two_sequences_are_not_packed(pairs: None) -> None:
    with pytest.raises(RecipeError, match=r"the method pairs has 2 a row"):
        load_recipe(QUICKSTART, ["method=pairs", "training.packing=true"])
