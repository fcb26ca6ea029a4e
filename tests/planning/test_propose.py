"""A proposal fits by the planner's own verdict, gives up as little as it can, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gemma_tune.engines.choose import decide_for_card
from gemma_tune.machine.cards import CARDS, Card, find_card
from gemma_tune.models.catalogue import MODELS
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.planning.propose import COMFORTABLE, LONG_SECONDS, Proposal, RowFacts, choose_model, models_for, propose
from gemma_tune.recipe.schema import Recipe


def rows(lengths: Sequence[int] = (200,), num_rows: int = 15_000) -> RowFacts:
    return RowFacts("databricks/databricks-dolly-15k", "dolly", {}, num_rows, sorted(lengths))


def proposed(model: str, facts: RowFacts, card: Card | None) -> Proposal:
    found = propose(model, facts, card=card)
    assert found is not None
    return found


@pytest.mark.parametrize("card", ["rtx-3060", "t4", "l4", "a100-40", "h100"])
@pytest.mark.parametrize("model", ["gemma-2b", "gemma-7b", "gemma-3-4b-it"])
def test_the_planner_says_that_it_fits(model: str, card: str) -> None:
    facts = rows([2000])
    found = proposed(model, facts, CARDS[card])
    decision = decide_for_card(found.recipe, card=CARDS[card])
    assert plan_recipe(found.recipe, card=CARDS[card], decision=decision) == found.plan
    assert found.plan is not None and found.plan.verdict in ("fits", "tight")
    training = found.recipe.training
    assert training.batch_size * training.gradient_accumulation == 16


def test_the_batch_shrinks_before_the_optimizer_and_the_length() -> None:
    long = rows([200] * 80 + [900] * 5 + [8000] * 15)
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
    assert "about 15.0% of the rows are longer" in why["data.max_seq_tokens"]
    assert propose("gemma-7b", long, card=find_card("GB=4")) is None
    # Where a shorter length would leave out more than a fifth of the rows, the model does not fit.
    assert propose("gemma-7b", rows([8000]), card=find_card("GB=11")) is None


def test_nearly_every_row_fits_the_length() -> None:
    assert proposed("gemma-7b", rows([100] * 985 + [3000] * 15), CARDS["h100"]).recipe.data.max_seq_tokens == 4096
    outlier = proposed("gemma-7b", rows([100] * 995 + [3000] * 5), CARDS["h100"])
    assert outlier.recipe.data.max_seq_tokens == 128
    assert any("about 0.5% of the rows are longer" in setting.why for setting in outlier.settings)
    endless = proposed("gemma-7b", rows([100_000]), CARDS["h100"]).recipe.data
    assert (endless.max_seq_tokens, endless.too_long) == (8192, "truncate")
    assert proposed("gemma-7b", rows([8192]), CARDS["h100"]).recipe.data.too_long == "drop"


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


def is_comfortable(proposal: Proposal) -> bool:
    plan = proposal.plan
    assert plan is not None and plan.card is not None and plan.schedule.seconds is not None
    has_room = plan.need_bytes <= COMFORTABLE * plan.card.usable_bytes
    return plan.verdict == "fits" and has_room and plan.schedule.seconds <= LONG_SECONDS


@pytest.mark.parametrize(("card", "num_rows"), [("t4", 15_000), ("h100", 15_000), ("l4", 100), ("rtx-3060", 100)])
def test_the_default_model_is_the_largest_with_room_that_is_done_in_a_night(card: str, num_rows: int) -> None:
    facts = rows(num_rows=num_rows)
    names = models_for(CARDS[card], chat=False)
    assert [MODELS[name].num_params for name in names] == sorted((MODELS[n].num_params for n in names), reverse=True)
    proposals = [found for name in names if (found := propose(name, facts, card=CARDS[card]))]
    chosen = choose_model(proposals)
    assert is_comfortable(chosen)
    assert not any(is_comfortable(each) for each in proposals[: proposals.index(chosen)])
    # Where every run takes longer than a night, the largest that fits.
    slow = [
        replace(each, plan=replace(each.plan, schedule=replace(each.plan.schedule, seconds=1e6)))
        for each in proposals
        if each.plan
    ]
    assert choose_model(slow) == next(each for each in slow if each.plan and each.plan.verdict == "fits")


def test_models_of_the_goal_and_of_a_processor() -> None:
    assert all(MODELS[name].is_instruction_tuned for name in models_for(CARDS["t4"], chat=True))
    assert not any(MODELS[name].is_instruction_tuned for name in models_for(CARDS["t4"], chat=False))
    assert models_for(None, chat=False)[0] == "gemma-tiny"
