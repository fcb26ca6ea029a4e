"""A proposal fits by the planner's own verdict, gives up as little as it can, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gemma_tune.engines.precision import Device, Precision
from gemma_tune.engines.settle import settle
from gemma_tune.models.registry import MODELS
from gemma_tune.planning.cards import CARDS, Card, find_card
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.planning.propose import LONG_SECONDS, Proposal, RowFacts, choose_model, models_for, propose
from gemma_tune.recipe.schema import DataSection, Recipe


def decide(card: Card) -> tuple[Precision, str]:
    usual = Recipe(data=DataSection(source="x", max_seq_tokens=8))
    return settle(usual, device=Device("cuda", card.name, card.compute_capability, card.memory_bytes))


def rows(lengths: Sequence[int] = (200,), num_rows: int = 15_000) -> RowFacts:
    return RowFacts("databricks/databricks-dolly-15k", "dolly", {}, num_rows, sorted(lengths))


def proposed(model: str, facts: RowFacts, card: Card | None) -> Proposal:
    found = propose(model, facts, card=card, decide=decide)
    assert found is not None
    return found


@pytest.mark.parametrize("card", ["rtx-3060", "t4", "l4", "a100-40", "h100"])
@pytest.mark.parametrize("model", ["gemma-2b", "gemma-7b", "gemma-3-4b-it"])
def test_the_planner_says_that_it_fits(model: str, card: str) -> None:
    facts = rows([2000])
    found = proposed(model, facts, CARDS[card])
    precision, engine = decide(CARDS[card])
    assert plan_recipe(found.recipe, card=CARDS[card], precision=precision, engine=engine) == found.plan
    assert found.plan is not None and found.plan.verdict in ("fits", "tight")
    training = found.recipe.training
    assert training.batch_size * training.gradient_accumulation == 16


def test_the_batch_shrinks_before_the_optimizer_and_the_length() -> None:
    long = rows([8000])
    wide = proposed("gemma-7b", long, CARDS["h100"])
    assert wide.recipe.data.max_seq_tokens == 8192
    assert wide.recipe.training.optimizer == "adamw"
    smaller = [proposed("gemma-7b", long, find_card(f"GB={size}")) for size in (40, 24, 16, 11)]
    order = ("adamw", "adamw_8bit", "paged_adamw_8bit")
    given_up = [
        (
            -each.recipe.data.max_seq_tokens,
            order.index(each.recipe.training.optimizer),
            -each.recipe.training.batch_size,
        )
        for each in [wide, *smaller]
    ]
    assert given_up == sorted(given_up)
    assert smaller[-1].recipe.data.max_seq_tokens < 8192
    why = {setting.path: setting.why for setting in smaller[-1].settings}
    assert "would not fit on the card" in why["data.max_seq_tokens"]
    assert "100.0% of the rows are longer" in why["data.max_seq_tokens"]
    assert propose("gemma-7b", long, card=find_card("GB=4"), decide=decide) is None


def test_nearly_every_row_fits_the_length() -> None:
    assert proposed("gemma-7b", rows([100] * 985 + [3000] * 15), CARDS["h100"]).recipe.data.max_seq_tokens == 4096
    outlier = proposed("gemma-7b", rows([100] * 995 + [3000] * 5), CARDS["h100"])
    assert outlier.recipe.data.max_seq_tokens == 128
    assert any("about 0.5% of the rows are longer" in setting.why for setting in outlier.settings)
    assert proposed("gemma-tiny", rows([100_000]), None).recipe.data.max_seq_tokens <= 8192


def test_settings_are_what_differs_from_the_defaults() -> None:
    found = proposed("gemma-7b-it", rows(num_rows=15), CARDS["t4"])
    values: dict[str, dict[str, object]] = {}
    for setting in found.settings:
        section, field = setting.path.split(".")
        values.setdefault(section, {})[field] = setting.value
    assert Recipe.model_validate(values) == found.recipe
    assert found.recipe.data.eval_fraction == 0
    assert found.recipe.training.learning_rate == 1e-4
    why = {setting.path: setting.why for setting in found.settings}
    assert "float16" in why["model.dtype"]
    unexplained = {path for path, reason in why.items() if not reason}
    assert unexplained == {"data.source"}


def test_the_default_model_is_the_largest_that_is_done_in_a_night() -> None:
    names = models_for(CARDS["t4"], chat=False)
    assert [MODELS[name].num_params for name in names] == sorted((MODELS[n].num_params for n in names), reverse=True)
    few, many = rows(num_rows=100), rows()
    for card, facts in ((CARDS["t4"], many), (CARDS["h100"], many), (CARDS["rtx-3060"], few)):
        proposals = [found for name in names if (found := propose(name, facts, card=card, decide=decide))]
        chosen = choose_model(proposals)
        assert chosen.plan is not None and chosen.plan.verdict == "fits"
        assert (chosen.plan.schedule.seconds or 0) <= LONG_SECONDS
        larger = proposals[: proposals.index(chosen)]
        assert all(
            each.plan and (each.plan.verdict == "tight" or (each.plan.schedule.seconds or 0) > LONG_SECONDS)
            for each in larger
        )
    slow = [
        replace(each, plan=replace(each.plan, schedule=replace(each.plan.schedule, seconds=1e6)))
        for each in proposals
        if each.plan
    ]
    assert choose_model(slow) == next(each for each in slow if each.plan and each.plan.verdict == "fits")
    assert all(MODELS[name].is_instruction_tuned for name in models_for(CARDS["t4"], chat=True))
    assert models_for(None, chat=False)[0] == "gemma-tiny"
