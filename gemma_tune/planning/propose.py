"""A recipe for given rows, a model and a card: length, batch, optimizer and epochs, each with its reason."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.engines.choose import EngineDecision, decide_for_card
from gemma_tune.machine.cards import Card
from gemma_tune.models.catalogue import TINY
from gemma_tune.planning.changes import with_overrides
from gemma_tune.planning.known_base import Base, find_base
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.planning.verdict import Plan
from gemma_tune.recipe.commented import Setting
from gemma_tune.recipe.schema import DataSection, ModelSection, Recipe

# The largest first; of the families that the plan knows well (docs/planning.md) and that a card
# without bfloat16 trains, too. An -it model has the same name with -it behind it.
_LADDER = (
    "gemma-3-27b", "gemma-3-12b", "gemma-2-9b", "gemma-7b", "gemma-3-4b", "gemma-2b", "gemma-3-1b", "gemma-3-270m",
)  # fmt: skip
# Up to a billion parameters a processor trains with patience.
_PROCESSOR_LADDER = ("gemma-3-270m",)
# A first run should be sure of its card, as no plan has been measured on one yet, and be done in a night.
COMFORTABLE = 0.8
LONG_SECONDS = 8 * 3600
# Rows that are longer are left out: nearly all are to fit, and on a small card still most of them.
_LEFT_OUT, _MOST_LEFT_OUT = 0.01, 0.2
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_SHORTEST = 256
_BATCHES = (8, 4, 2, 1)
_OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
_OPTIMIZER_WHY = {
    "adamw_8bit": "a quarter of AdamW's state: 32-bit moments would not fit here",
    "paged_adamw_8bit": "8-bit state that moves to the host when the card is full",
}
_FEW_ROWS, _MANY_ROWS = 500, 5_000
# Fewer than that leave nothing to hold out.
_MIN_ROWS_TO_EVALUATE = 20


@dataclass(frozen=True)
class RowFacts:
    """What a proposal needs to know of rows; source, template and columns are as in a recipe's data section.

    `num_rows` counts those that will be held out, too; `lengths` are the tokens of rows that were looked at, sorted."""

    source: str
    template: str
    columns: Mapping[str, str]
    num_rows: int
    lengths: Sequence[int]
    given: Mapping[str, Any] = field(default_factory=dict)  # settings of the data section that are not to be decided

    def share_longer(self, tokens: int) -> float:
        """The share of rows that are longer than `tokens`."""
        return sum(length > tokens for length in self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Proposal:
    """A recipe that fits, with the settings that differ from the defaults and why. `plan` is None on a processor, which
    is not planned for."""

    model: str
    recipe: Recipe
    settings: tuple[Setting, ...]
    plan: Plan | None


def models_for(card: Card | None, *, chat: bool) -> list[str]:
    """Models worth proposing, the largest first. `chat`: instruction-tuned ones."""
    ladder = _PROCESSOR_LADDER if card is None else _LADDER
    named = [f"{name}-it" if chat else name for name in ladder]
    return [TINY, *named] if card is None else named


def choose_model(proposals: Sequence[Proposal]) -> Proposal:
    """The first that leaves a fifth of the card free and is done in a night; else one that fits, else the first."""
    fitting = [each for each in proposals if each.plan is None or each.plan.verdict == "fits"]
    return next((each for each in fitting if _is_comfortable(each)), (*fitting, *proposals)[0])


def _is_comfortable(proposal: Proposal) -> bool:
    plan = proposal.plan
    if plan is None or plan.card is None:
        return True
    return plan.need_bytes <= COMFORTABLE * plan.card.usable_bytes and (plan.schedule.seconds or 0) <= LONG_SECONDS


def propose(model: str, rows: RowFacts, *, card: Card | None) -> Proposal | None:
    """The recipe for a model on a card; None where it fits with no setting that keeps most of the rows.

    Nothing is given up before it has to be: first the rows of a batch (their number a step stays), then the precision
    of the optimizer's state, then the length of rows.

    Args:
        card: None for a processor.

    Raises:
        ModelError: no such model, or nothing is known of it.
    """
    base = find_base(model)
    wanted = _wanted_tokens(rows, context_tokens=base.config.context_tokens)
    per_step = 16 if rows.num_rows >= _FEW_ROWS else 8 if rows.num_rows >= 100 else 4
    start = Recipe(
        model=ModelSection(name=model),
        data=DataSection(
            source=rows.source, template=rows.template, columns=dict(rows.columns), max_seq_tokens=wanted, **rows.given
        ),
    )
    start = with_overrides(start, _settings_by_rows(base, rows, tokens=wanted))
    if card is None:
        batch = min(4, per_step)
        overrides = {"training.batch_size": batch, "training.gradient_accumulation": per_step // batch}
        recipe = with_overrides(start, overrides)
        return Proposal(model, recipe, _explain(recipe, rows, base=base, wanted=wanted, dtype_why=""), None)
    decision = decide_for_card(start, card=card)
    lengths = [tokens for tokens in _halved(wanted) if tokens == wanted or rows.share_longer(tokens) <= _MOST_LEFT_OUT]
    ways = _ways(lengths, per_step=per_step)
    found = _search(start, ways, base=base, card=card, decision=decision)
    if found is None:
        return None
    recipe, plan = found
    dtype_why = (
        "" if decision.precision.compute == "bfloat16" else f"{card.name} has no bfloat16: float16 next to float32"
    )
    return Proposal(model, recipe, _explain(recipe, rows, base=base, wanted=wanted, dtype_why=dtype_why), plan)


def _wanted_tokens(rows: RowFacts, *, context_tokens: int) -> int:
    """The shortest of the usual lengths that holds nearly every row."""
    wanted = next((tokens for tokens in _LENGTHS if rows.share_longer(tokens) <= _LEFT_OUT), _LENGTHS[-1])
    return min(wanted, context_tokens)


def _settings_by_rows(base: Base, rows: RowFacts, *, tokens: int) -> dict[str, Any]:
    """What the rows and the model decide alone."""
    num_rows = rows.num_rows
    overrides: dict[str, Any] = {"evaluation.exact_match": False}
    if rows.share_longer(tokens) > _MOST_LEFT_OUT:
        overrides["data.too_long"] = "truncate"
    if num_rows < _MIN_ROWS_TO_EVALUATE:
        overrides["data.eval_fraction"] = 0.0
    if num_rows < _MANY_ROWS:
        overrides["training.epochs"] = 3.0 if num_rows < _FEW_ROWS * 2 else 2.0
    if base.name == TINY:
        overrides |= {"training.learning_rate": 3e-3, "training.gradient_checkpointing": "off"}
    elif base.model is not None and base.model.is_instruction_tuned:
        overrides["training.learning_rate"] = 1e-4
    return {path: value for path, value in overrides.items() if path.removeprefix("data.") not in rows.given}


def _halved(tokens: int) -> list[int]:
    lengths = [tokens]
    while lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths


def _ways(lengths: Sequence[int], *, per_step: int) -> Iterator[dict[str, Any]]:
    batches = [rows for rows in _BATCHES if rows <= per_step]
    for length, optimizer, rows in itertools.product(lengths, _OPTIMIZERS, batches):
        yield {
            "data.max_seq_tokens": length,
            "training.batch_size": rows,
            "training.gradient_accumulation": per_step // rows,
            "training.optimizer": optimizer,
        }


def _search(
    start: Recipe, ways: Iterable[dict[str, Any]], *, base: Base, card: Card, decision: EngineDecision
) -> tuple[Recipe, Plan] | None:
    """The first way that fits, or the first that is tight."""
    tight = None
    for overrides in ways:
        recipe = with_overrides(start, overrides)
        plan = plan_recipe(recipe, card=card, decision=decision, base=base, suggest=False)
        if plan.verdict == "fits":
            return recipe, plan
        if plan.verdict == "tight" and tight is None:
            tight = recipe, plan
    return tight


def _explain(recipe: Recipe, rows: RowFacts, *, base: Base, wanted: int, dtype_why: str) -> tuple[Setting, ...]:
    """The settings that differ from the defaults, in the schema's order, with their reasons."""
    training, tokens = recipe.training, recipe.data.max_seq_tokens
    longer = rows.share_longer(tokens)
    length_why = f"about {longer:.1%} of the rows are longer" if longer else "no row seems longer"
    if tokens < wanted:
        length_why += f"; {wanted} would not fit on the card"
    per_step = training.batch_size * training.gradient_accumulation
    reasons: dict[str, str] = {
        "model.name": "in 4 bits; the others: gemma-tune models list",
        "model.dtype": dtype_why,
        "data.template": "how a row becomes prompt and answer",
        "data.columns": "field of the template: column of the rows",
        "data.max_seq_tokens": length_why,
        "data.too_long": "so many rows are long that they are cut, the prompt first, rather than left out",
        "data.eval_fraction": "too few rows to hold some out",
        "training.epochs": f"{rows.num_rows:,} rows are few, so each is seen again; watch the eval loss",
        "training.batch_size": "rows at once: more are quicker and take more memory",
        "training.gradient_accumulation": f"{per_step} rows a step",
        "training.learning_rate": (
            "fifteen times what a large Gemma takes"
            if base.name == TINY
            else "half the usual: an -it model has more to lose than to learn"
        ),
        "training.optimizer": _OPTIMIZER_WHY.get(training.optimizer, ""),
        "training.gradient_checkpointing": "would save memory, which is not short here, at the price of time",
        "evaluation.exact_match": "free text has many right answers",
    }
    always = {"model.name", "data.source", "data.template", "data.max_seq_tokens", "training.batch_size"}
    always |= {"model.dtype"} if dtype_why else set()
    settings = []
    for section_name in Recipe.model_fields:
        section = getattr(recipe, section_name)
        for name, declared in type(section).model_fields.items():
            path, value = f"{section_name}.{name}", getattr(section, name)
            if path in always or value != declared.get_default(call_default_factory=True):
                settings.append(Setting(path, value, reasons.get(path, "")))
    return tuple(settings)
