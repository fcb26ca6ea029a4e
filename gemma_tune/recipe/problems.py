"""What is wrong with a recipe: one `Problem` a mistake, all of them in one message."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gemma_tune.errors import RecipeError
from gemma_tune.recipe.keys import bounds_of, field_at, hint_for, in_words, is_like_a_key
from gemma_tune.text import suggestion


@dataclass(frozen=True)
class Problem:
    """One mistake."""

    path: str  # YAML path such as `training.learning_rate`
    message: str  # what was found and what is allowed
    fix: str | None = None  # the change that corrects it, when there is an obvious one
    shown_path: str | None = None  # the path in messages, where the key is not to be repeated


_PLAIN = {
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of names to names",
    "model_type": "must be a section with settings of its own",
    "model_attributes_type": "must be a section with settings of its own",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be 1 to 64 letters, digits, '.', '_' or '-', not starting with '.' or '-'",
    "too_short": "must name at least one",
}
_WHOLE_NUMBER = ("int_type", "int_from_float", "int_parsing", "int_parsing_size")
_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
# Values that went, and what serves in their place.
_SERVED_BY = {"training.data_parallel='zero2'": "training.data_parallel=fsdp"}
_MAX_WORD_CHARS = 60
_MAX_DIGITS = 6  # of a word; a telephone number has more


def _found(value: object) -> str:
    """The value as YAML would show it; of what may be a row's, such as a name or a number to call, only the kind."""
    if isinstance(value, str):
        is_word = len(value) <= _MAX_WORD_CHARS and not any(map(str.isspace, value)) and "@" not in value
        is_word &= sum(map(str.isdigit, value)) <= _MAX_DIGITS
        return f"'{value}'" if is_word else f"text of {len(value)} characters"
    if isinstance(value, bool | None):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return (
        str(value) if isinstance(value, int | float) else "a list" if isinstance(value, list | tuple) else "a mapping"
    )


def _allowed(error: ErrorDetails, field: FieldInfo | None) -> str:
    """The rule that a value broke, in words."""
    kind = error["type"]
    if kind in (*_WHOLE_NUMBER, *_OUT_OF_BOUNDS, "float_type", "float_parsing"):
        limits = error.get("ctx", {})
        is_whole = kind in _WHOLE_NUMBER or (bool(limits) and all(isinstance(limit, int) for limit in limits.values()))
        bounds = bounds_of(field) if field else in_words(limits)
        return f"must be a {'whole ' if is_whole else ''}number {bounds}".rstrip()
    if kind == "literal_error":
        return "must be one of " + str(error["ctx"]["expected"]).replace(" or ", ", ")
    return _PLAIN.get(kind, error["msg"])


def problem_of(error: ErrorDetails, root: type[BaseModel]) -> Problem:
    """Translate one pydantic error; `root` is the model that was read."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        where, shown = "section" if len(error["loc"]) == 1 else "key", None
        if not is_like_a_key(str(error["loc"][-1])):
            shown = ".".join([*map(str, error["loc"][:-1]), "…"])
        return Problem(path, f"unknown {where}; {hint_for(root, error['loc'])}", shown_path=shown)
    if error["type"] == "missing":
        return Problem(path, "is required and missing")
    is_section = error["type"] in ("model_type", "model_attributes_type")  # text in its place may be anything
    found = "text" if is_section and isinstance(error["input"], str) else _found(error["input"])
    near = suggestion(found, re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", ""))))
    message = f"{_allowed(error, field_at(root, error['loc']))}, found {found}{near}"
    return Problem(path, message, fix=_SERVED_BY.get(f"{path}={found}"))


def raise_problems(problems: Sequence[Problem], *, label: str, lines: dict[str, int]) -> None:
    """Raise one `RecipeError` that lists every problem with its file, line and YAML path, if there is any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(
            f"{count} in the recipe\n{list_problems(problems, label=label, lines=lines)}",
            hint="every key with its type and meaning: gemma-tune recipes schema",
        )


def list_problems(problems: Sequence[Problem], *, label: str, lines: dict[str, int]) -> str:
    """Return a line a problem, with its file, line and YAML path."""
    told = []
    for problem in problems:
        where = _where(problem.path, label=label, lines=lines)
        fix = f"\n    fix: {problem.fix}" if problem.fix else ""
        told.append(f"  {where}: {problem.shown_path or problem.path}: {problem.message}{fix}")
    return "\n".join(told)


def _where(path: str, *, label: str, lines: dict[str, int]) -> str:
    """`file:line` of the path or of its nearest parent; line 0 marks a value from the command line."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        line = lines.get(".".join(parts[:length]))
        if line is not None:
            return f"{label}:{line}" if line else "command line"
    return label
