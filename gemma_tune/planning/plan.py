"""Does a recipe fit on a card, how long does it take, and what would make it fit."""

from collections.abc import Sequence
from dataclasses import replace

from gemma_tune.data.look.count import count_train_rows
from gemma_tune.engines.choose import EngineDecision, decide_for_card
from gemma_tune.errors import EngineError
from gemma_tune.machine.cards import CARDS, Card
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import count_params
from gemma_tune.planning import memory
from gemma_tune.planning.activations import activations
from gemma_tune.planning.breakdown import disk_parts, export_parts, host_parts, moment_parts, resident_parts
from gemma_tune.planning.changes import find_changes, length_overrides, with_overrides
from gemma_tune.planning.known_base import Base, find_base
from gemma_tune.planning.schedule import pass_seconds, plan_schedule
from gemma_tune.planning.step import to_step
from gemma_tune.planning.verdict import CONTEXT_BYTES, FRAGMENTATION, Plan
from gemma_tune.recipe.schema import Recipe

TABLE_TOKENS = (512, 1024, 2048, 4096, 8192)


def plan_recipe(
    recipe: Recipe,
    *,
    card: Card | None,
    decision: EngineDecision,
    base: Base | None = None,
    processes: int = 1,
    suggest: bool = True,
) -> Plan:
    """Plan a recipe for a card, from facts alone: no weights, no GPU, no network.

    Memory is that of a batch whose rows are all as long as the recipe allows; time is that of rows of mean length.

    Args:
        card: None plans without a verdict.
        decision: engine and precision, as `engines.choose` decides them for the card.
        base: the model, where it is known already.
        processes: cards that train together, each as this one. A sharded model is counted whole, as it is loaded whole.
        suggest: look for changes that would fit where the recipe does not.

    Raises:
        ModelError: as `find_base`, and where a LoRA target is no module of the model.
    """
    base = base or find_base(recipe.model.name)
    config = base.config
    step = to_step(recipe, config=config, decision=decision)
    resident = resident_parts(recipe, base=base, step=step, processes=processes)
    free = None if card is None else card.usable_bytes - CONTEXT_BYTES - sum(part.bytes for part in resident)
    found = activations(config, step, free_bytes=free)
    moments = moment_parts(recipe, config=config, step=step, found=found, free_bytes=free)
    plan = Plan(
        model=base.name,
        num_params=count_params(config),
        num_trained=memory.count_trained(config, step.lora),
        card=card,
        engine=decision.engine.name,
        compute=decision.precision.compute,
        resident=resident,
        moments=moments,
        context_bytes=CONTEXT_BYTES,
        margin_bytes=round(FRAGMENTATION * max(moment.bytes for moment in moments)),
        host=host_parts(recipe, base=base, step=step, found=found),
        disk=disk_parts(recipe, base=base, step=step),
        exports=export_parts(recipe, base=base),
        schedule=plan_schedule(
            config,
            step,
            training=recipe.training,
            counted=count_train_rows(recipe.data),
            card=card,
            processes=processes,
        ),
        changes=(),
    )
    if not suggest or plan.verdict != "does not fit":
        return plan
    changes = find_changes(
        recipe,
        config=config,
        engine=decision.engine,
        is_tuned=base.model is not None and base.model.is_instruction_tuned,
        replan=lambda changed: plan_recipe(
            changed,
            card=card,
            decision=decision,
            base=base if changed.model.name == recipe.model.name else None,
            processes=processes,
            suggest=False,
        ),
        seconds=lambda changed: _row_seconds(changed, config=config, card=card, decision=decision),
    )
    return replace(plan, changes=changes)


def _row_seconds(recipe: Recipe, *, config: TextConfig, card: Card | None, decision: EngineDecision) -> float:
    """Time of a row of 512 tokens, or fewer. A card of unknown speed counts as an L4."""
    step = to_step(recipe, config=config, decision=decision)
    length = min(step.batch.tokens, 512)
    known = CARDS["l4"] if card is None or card.tera_flops is None else card
    seconds = pass_seconds(config, step, card=known, tokens=step.batch.rows * length, row_tokens=length)
    assert seconds is not None
    return seconds / step.batch.rows


def plan_table(recipe: Recipe, cards: Sequence[Card]) -> tuple[tuple[int, ...], list[tuple[Card, list[Plan]]]]:
    """Plan cards × sequence lengths: the lengths, and a row of plans for each card that can do what the recipe asks."""
    base = find_base(recipe.model.name)
    lengths = tuple(tokens for tokens in TABLE_TOKENS if tokens <= base.config.context_tokens)
    rows = []
    for card in cards:
        try:
            decision = decide_for_card(recipe, card=card)
        except EngineError:
            continue
        plans = [
            plan_recipe(
                with_overrides(recipe, length_overrides(recipe, tokens)),
                card=card,
                decision=decision,
                base=base,
                suggest=False,
            )
            for tokens in lengths
        ]
        rows.append((card, plans))
    return lengths, rows
