"""Rules that concern more than one setting. Each is a small function from a recipe to problems, listed in `RULES`."""

from collections.abc import Callable

from gemma_tune.engines.engine_facts import ENGINES
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


def _one_source(recipe: Recipe) -> list[Problem]:
    data = recipe.data
    if data.source is not None and data.mix:
        return [Problem("data.mix", "excludes data.source: name every source in data.mix", fix="data.source=null")]
    return []


def _mix_is_measured_one_way(recipe: Recipe) -> list[Problem]:
    mix = recipe.data.mix
    weighted = [index for index, part in enumerate(mix) if part.weight is not None]
    problems = [
        Problem(f"data.mix.{index}.weight", "a source has either a weight or #N rows", fix="remove one of them")
        for index in weighted
        if "#" in mix[index].source
    ]
    if weighted and len(weighted) < len(mix):
        missing = next(index for index in range(len(mix)) if index not in weighted)
        problems.append(
            Problem(f"data.mix.{missing}.weight", "is missing: give every source of the mix a weight, or none")
        )
    return problems


def _response_bounds_leave_room(recipe: Recipe) -> list[Problem]:
    clean = recipe.data.clean
    if clean.min_response_words and clean.max_response_words and clean.min_response_words > clean.max_response_words:
        return [
            Problem(
                "data.clean.max_response_words",
                f"is {clean.max_response_words}, below data.clean.min_response_words {clean.min_response_words}",
            )
        ]
    return []


def _packing_is_asked_for(recipe: Recipe) -> list[Problem]:
    if recipe.training.pack_tokens and not recipe.training.packing:
        return [Problem("training.pack_tokens", "has no meaning without training.packing", fix="training.packing=true")]
    return []


def _method_can_be_packed(recipe: Recipe) -> list[Problem]:
    sequences = recipe.method_facts.sequences_per_row
    if recipe.training.packing and sequences > 1:
        why = f"joins rows of one sequence, and the method {recipe.method.name} has {sequences} a row"
        return [Problem("training.packing", why, fix="training.packing=false")]
    return []


def _one_eval_source(recipe: Recipe) -> list[Problem]:
    if recipe.data.mix and recipe.data.eval_split:
        return [
            Problem("data.eval_split", "names a split of data.source, and there is a mix", fix="data.eval_source=…")
        ]
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


def _shards_what_can_be(recipe: Recipe) -> list[Problem]:
    """What cannot be cut into shares, or put back into them (F48)."""
    training, model = recipe.training, recipe.model
    if training.data_parallel == "ddp":
        return []
    why_not_sharded = ENGINES[model.engine].why_not_sharded if model.engine in ENGINES else None
    refused = (
        (why_not_sharded is not None, "model.engine", why_not_sharded, "model.engine=auto"),
        (
            model.load_in_8bit,
            "model.load_in_8bit",
            "int8 layers keep their scales apart from the weights, and cannot be sharded",
            "model.load_in_8bit=false model.load_in_4bit=true",
        ),
        (
            "8bit" in training.optimizer or "paged" in training.optimizer or training.optimizer == "adafactor",
            "training.optimizer",
            f"{training.optimizer} keeps a state that does not lie along the weights, and cannot be sharded; the state "
            f"of an adapter is small",
            "training.optimizer=adamw",
        ),
        (
            training.early_stop_patience is not None,
            "training.early_stop_patience",
            "the best adapter is not put back into a sharded model",
            "training.early_stop_patience=null",
        ),
    )
    return [
        Problem(path, f"{why}, and training.data_parallel is {training.data_parallel}", fix=fix)
        for is_so, path, why, fix in refused
        if is_so
    ]


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
    _one_source,
    _mix_is_measured_one_way,
    _response_bounds_leave_room,
    _packing_is_asked_for,
    _method_can_be_packed,
    _one_eval_source,
    _early_stop_evaluates,
    _shards_what_can_be,
    _has_eval_rows,
    _no_init_from_quantised,
    _all_linear_stands_alone,
    _no_duplicate_names,
)


def check_rules(recipe: Recipe) -> list[Problem]:
    """Every broken rule of a recipe that is valid field by field."""
    return [problem for rule in RULES for problem in rule(recipe)]
