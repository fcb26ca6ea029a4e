"""Rules that concern more than one setting. Each is a small function from a recipe to problems, listed in `RULES`."""

from __future__ import annotations

from collections.abc import Callable

from gemma_tune.recipe.problems import Problem
from gemma_tune.recipe.schema import Recipe


def _one_quantisation(recipe: Recipe) -> list[Problem]:
    if recipe.model.load_in_4bit and recipe.model.load_in_8bit:
        return [
            Problem(
                "model.load_in_8bit", "a model is loaded in 4 bits or in 8, not both", fix="model.load_in_4bit=false"
            )
        ]
    return []


def _one_eval_source(recipe: Recipe) -> list[Problem]:
    if recipe.data.eval_source and recipe.data.eval_split:
        return [
            Problem(
                "data.eval_split",
                "excludes data.eval_source: it names a split of data.source",
                fix="data.eval_split=null",
            )
        ]
    return []


def _early_stop_evaluates(recipe: Recipe) -> list[Problem]:
    training, evaluation = recipe.training, recipe.evaluation
    if training.early_stop_patience and not evaluation.every_steps:
        return [
            Problem(
                "training.early_stop_patience", "needs an eval loss while training", fix="evaluation.every_steps=50"
            )
        ]
    return []


def _has_eval_rows(recipe: Recipe) -> list[Problem]:
    data = recipe.data
    if not data.eval_source and not data.eval_split and data.eval_fraction == 0 and recipe.evaluation.every_steps:
        return [
            Problem("data.eval_fraction", "0 leaves no rows for evaluation.every_steps", fix="data.eval_fraction=0.05")
        ]
    return []


def _no_init_from_quantised(recipe: Recipe) -> list[Problem]:
    if recipe.lora.init in ("pissa", "olora") and (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        return [
            Problem(
                "lora.init",
                f"{recipe.lora.init} rewrites the base weights and so needs them in 16 bits; an export on the "
                f"original base would be wrong",
                fix="lora.init=default",
            )
        ]
    return []


def _all_linear_stands_alone(recipe: Recipe) -> list[Problem]:
    targets = recipe.lora.targets
    if "all-linear" in targets and len(targets) > 1:
        return [
            Problem(
                "lora.targets",
                "'all-linear' already names every linear layer; give it alone",
                fix="lora.targets=[all-linear]",
            )
        ]
    return []


def _no_duplicate_names(recipe: Recipe) -> list[Problem]:
    problems = []
    for field in ("targets", "modules_to_save"):
        names = getattr(recipe.lora, field)
        if len(set(names)) < len(names):
            problems.append(Problem(f"lora.{field}", f"names a module twice: {', '.join(names)}"))
    overlap = set(recipe.lora.targets) & set(recipe.lora.modules_to_save)
    if overlap:
        problems.append(
            Problem(
                "lora.modules_to_save", f"{', '.join(sorted(overlap))} would be trained twice: it is in lora.targets"
            )
        )
    return problems


RULES: tuple[Callable[[Recipe], list[Problem]], ...] = (
    _one_quantisation,
    _one_eval_source,
    _early_stop_evaluates,
    _has_eval_rows,
    _no_init_from_quantised,
    _all_linear_stands_alone,
    _no_duplicate_names,
)


def check_rules(recipe: Recipe) -> list[Problem]:
    """Every broken rule of a recipe that is valid field by field."""
    return [problem for rule in RULES for problem in rule(recipe)]
