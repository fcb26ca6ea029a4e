"""What is told to make a recipe fit does make it fit, and asks for no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.engines.choose import EngineDecision, decide_for_card
from gemma_tune.machine.cards import Card, find_card
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.planning.verdict import Change, Plan
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import Recipe


def _recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(Path(name), overrides).recipe


def _decide(recipe: Recipe, card: Card, *, engine: str) -> EngineDecision:
    model = recipe.model.model_copy(update={"engine": engine})
    return decide_for_card(recipe.model_copy(update={"model": model}), card=card)


def _plan(recipe: Recipe, gpu: str, *, engine: str = "unsloth") -> Plan:
    card = find_card(gpu)
    return plan_recipe(recipe, card=card, decision=_decide(recipe, card, engine=engine))


def _changes(recipe: Recipe, gpu: str, *, engine: str = "unsloth") -> tuple[Change, ...]:
    return _plan(recipe, gpu, engine=engine).changes


@pytest.mark.parametrize(
    ("name", "overrides", "gpu", "engine"),
    [
        ("gemma-7b-dolly", (), "GB=8", "unsloth"),
        ("gemma-7b-dolly", ("training.batch_size=16", "training.gradient_checkpointing=off"), "l4", "transformers"),
        ("gemma-7b-dolly", ("model.load_in_4bit=false",), "t4", "unsloth"),
        ("gemma-2-9b-it-dolly", ("data.max_seq_tokens=8192", "lora.rank=64"), "rtx-3060", "unsloth"),
        ("gemma-2b-dolly", ("training.packing=true", "training.pack_tokens=8192"), "GB=4", "transformers"),
        ("gemma-2b-dolly", ("training.batch_size=24", "evaluation.batch_size=32"), "GB=6", "transformers"),
    ],
)
def test_the_changes_that_are_told_make_it_fit(name: str, overrides: tuple[str, ...], gpu: str, engine: str) -> None:
    recipe = _recipe(name, *overrides)
    assert _plan(recipe, gpu, engine=engine).verdict == "does not fit"
    changes = _changes(recipe, gpu, engine=engine)
    assert changes
    for change in changes:
        again = _plan(_recipe(name, *overrides, *change.overrides), gpu, engine=engine)
        assert again.verdict in ("fits", "tight"), change
        assert (again.verdict, again.need_bytes) == (change.verdict, change.need_bytes)


def test_changes_are_minimal_and_the_harmless_come_first() -> None:
    recipe = _recipe("gemma-7b-dolly", "training.batch_size=16", "training.gradient_checkpointing=off")
    changes = _changes(recipe, "l4", engine="transformers")
    assert changes[0].learns_the_same
    for change in changes:
        for left_out in change.overrides:
            fewer = [line for line in change.overrides if line != left_out]
            if left_out.startswith("training.gradient_accumulation"):
                continue  # goes with the batch size
            without = _recipe("gemma-7b-dolly", "training.batch_size=16", "training.gradient_checkpointing=off", *fewer)
            assert _plan(without, "l4", engine="transformers").verdict == "does not fit"


def test_where_no_setting_helps_a_smaller_model_is_named() -> None:
    (change,) = _changes(_recipe("gemma-2-9b-it-dolly"), "GB=6", engine="transformers")
    assert change.overrides == ("model.name=gemma-2-2b-it",)
    assert not change.learns_the_same
    assert _changes(_recipe("gemma-2-9b-it-dolly"), "GB=1") == ()


def test_a_smaller_model_that_the_attention_cannot_compute_is_passed_over() -> None:
    recipe = _recipe("gemma-7b-dolly", "model.attention=sdpa")  # which Gemma 2, the next smaller, is not computed with
    (change,) = _changes(recipe, "GB=4", engine="transformers")
    assert change.overrides == ("model.name=gemma-3-1b",)
