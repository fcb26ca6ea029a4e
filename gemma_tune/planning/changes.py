"""What would make a recipe fit: the smallest changes to it, verified by planning again."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.engines.engine_facts import EngineFacts
from gemma_tune.errors import EngineError
from gemma_tune.models.catalogue import MODELS, TINY
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import count_params
from gemma_tune.planning import memory
from gemma_tune.planning.verdict import Change, Plan
from gemma_tune.recipe.rules import check_rules
from gemma_tune.recipe.schema import Recipe

_MIN_TOKENS = 256
_MIN_RANK = 8
_MAX_CHANGES = 3
_Overrides = dict[str, Any]


def length_overrides(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Return the settings that make rows, or packs, `tokens` long."""
    overrides: dict[str, Any] = {"data.max_seq_tokens": tokens}
    if recipe.training.packing and recipe.training.pack_tokens is not None:
        overrides["training.pack_tokens"] = tokens
    return overrides


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some settings replaced, validated again."""
    values = recipe.model_dump()
    for path, value in overrides.items():
        section, field = path.split(".")
        values[section][field] = value
    return Recipe.model_validate(values)


def find_changes(
    recipe: Recipe,
    *,
    config: TextConfig,
    engine: EngineFacts,
    is_tuned: bool,
    replan: Callable[[Recipe], Plan],
    seconds: Callable[[Recipe], float],
) -> tuple[Change, ...]:
    """Find at most three sets of changes under which a recipe fits, none going further than another.

    Those that learn the same come first, then the faster ones; one that learns something else ends the list. Where no
    setting helps, a smaller model of the same kind is named.

    Args:
        replan: the plan of a changed recipe.
        seconds: of a row in a changed recipe.
    """

    def fitting(overrides: Mapping[str, Any]) -> Plan | None:
        changed = with_overrides(recipe, overrides)
        if check_rules(changed):
            return None
        try:
            plan = replan(changed)
        except EngineError:  # the attention that is asked for computes another model than the smaller one
            return None
        return None if plan.verdict == "does not fit" else plan

    levers = _levers(recipe, engine=engine)
    if fitting(_merge(lever[-1] for lever in levers)) is None:
        return _smaller_model(config, fitting, is_tuned=is_tuned)
    before = seconds(recipe)

    # Of all levers these three change the speed.
    @functools.cache
    def slowdown(checkpointing: _Option, batch: _Option, bits: _Option) -> float:
        return round(seconds(with_overrides(recipe, _merge((checkpointing, batch, bits)))) / before, 3)

    def cost(options: tuple[_Option, ...]) -> tuple[int, float, int]:
        return sum(option.harm for option in options), slowdown(*options[1:4]), len(_merge(options))

    found: list[tuple[tuple[_Option, ...], Change]] = []
    for options in sorted(itertools.product(*levers), key=cost):
        if any(_goes_further(options, than=other, levers=levers) for other, _ in found):
            continue
        overrides = _merge(options)
        plan = fitting(overrides)
        if plan is None:
            continue
        harm, slow, _ = cost(options)
        lines = tuple(
            f"{path}={str(value).lower() if isinstance(value, bool) else value}" for path, value in overrides.items()
        )
        found.append((options, Change(lines, plan.verdict, plan.need_bytes, slow, harm == 0)))
        if len(found) == _MAX_CHANGES or harm:
            break
    return tuple(change for _, change in found)


@dataclass(frozen=True, eq=False)
class _Option:
    """One setting of a lever. `harm` is 0 where the same is learned, else larger the more is given up."""

    overrides: Mapping[str, Any]
    harm: int = 0


def _levers(recipe: Recipe, *, engine: EngineFacts) -> list[list[_Option]]:
    """For each lever its settings, the recipe's own first: optimizer, checkpointing, batch, bits, rank, length."""
    model, training, lora, data = recipe.model, recipe.training, recipe.lora, recipe.data
    optimizers = [_Option({})]
    if training.optimizer in ("adamw", "adamw_fused", "paged_adamw"):
        optimizers.append(_Option({"training.optimizer": "adamw_8bit"}))
    if not memory.OPTIMIZERS[training.optimizer].is_paged:
        optimizers.append(_Option({"training.optimizer": "paged_adamw_8bit"}))
    ladder = ["off", "on", *filter(None, [engine.own_checkpointing])]
    now = training.gradient_checkpointing if training.gradient_checkpointing in ladder else "on"
    checkpointing = [_Option({})] + [
        _Option({"training.gradient_checkpointing": mode}) for mode in ladder[ladder.index(now) + 1 :]
    ]
    batches = [_Option({})]
    rows, accumulation = training.batch_size, training.gradient_accumulation
    while rows > 1:
        # The rows of a step stay what they are, rounded up where the batch is odd.
        accumulation = math.ceil(rows * accumulation / (rows // 2))
        rows //= 2
        option: _Overrides = {"training.batch_size": rows, "training.gradient_accumulation": accumulation}
        if (recipe.evaluation.batch_size or 0) > rows:
            option["evaluation.batch_size"] = rows
        batches.append(_Option(option))
    bits = [_Option({})]
    if not model.load_in_4bit:
        four: _Overrides = {"model.load_in_4bit": True}
        bits.append(_Option({**four, "model.load_in_8bit": False} if model.load_in_8bit else four))
    ranks = [_Option({})]
    rank = lora.rank
    while rank // 2 >= _MIN_RANK and len(ranks) < 3:
        rank //= 2
        ranks.append(_Option({"lora.rank": rank}, harm=len(ranks)))
    lengths = [_Option({})]
    tokens = data.max_seq_tokens
    while tokens // 2 >= _MIN_TOKENS:
        tokens //= 2
        lengths.append(_Option(length_overrides(recipe, tokens), harm=10 * len(lengths)))
    return [optimizers, checkpointing, batches, bits, ranks, lengths]


def _goes_further(options: tuple[_Option, ...], *, than: tuple[_Option, ...], levers: list[list[_Option]]) -> bool:
    """Whether every lever stands where it stood, or further."""
    return all(lever.index(one) >= lever.index(other) for lever, one, other in zip(levers, options, than, strict=True))


def _smaller_model(
    config: TextConfig, fitting: Callable[[Mapping[str, Any]], Plan | None], *, is_tuned: bool
) -> tuple[Change, ...]:
    """The largest smaller registry model that fits: of the same generation, else of any."""
    num_params = count_params(config)
    candidates = sorted(
        (
            model
            for model in MODELS.values()
            if model.name != TINY
            and model.is_instruction_tuned == is_tuned
            and model.num_params < num_params
            and not model.name.startswith("codegemma")
        ),
        key=lambda model: (model.family != config.family, -model.num_params),
    )
    for model in candidates:
        plan = fitting({"model.name": model.name})
        if plan is not None:
            ratio = round(model.num_params / num_params, 3)
            return (Change((f"model.name={model.name}",), plan.verdict, plan.need_bytes, ratio, False),)
    return ()


def _merge(options: Iterable[_Option]) -> _Overrides:
    return {path: value for option in options for path, value in option.overrides.items()}
