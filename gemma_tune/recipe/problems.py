"""What is wrong with a recipe: one `Problem` a mistake, all of them in one message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from gemma_tune.errors import RecipeError
from gemma_tune.text import did_you_mean


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        path: YAML path such as `training.learning_rate`.
        message: what was found and what is allowed.
        fix: the change that corrects it, when there is an obvious one.
    """

    path: str
    message: str
    fix: str | None = None


_PLAIN = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of names to names",
    "model_type": "must be a section with settings of its own",
    "model_attributes_type": "must be a section with settings of its own",
}


# Values that went, and what serves in their place.
_SERVED_BY = {"training.data_parallel='zero2'": "training.data_parallel=fsdp"}


def _found(value: object) -> str:
    """The value as YAML would show it, shortened."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or (f"'{value}'" if isinstance(value, str) else str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _allowed(error: ErrorDetails) -> str:
    """The rule that a value broke, in words."""
    kind, context = error["type"], error.get("ctx", {})
    bounds = {"greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}"}
    bounds |= {"less_than_equal": "at most {le}"}
    if kind in bounds:
        return "must be " + bounds[kind].format(**context)
    if kind == "literal_error":
        return "must be one of " + str(context["expected"]).replace(" or ", ", ")
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return "must be 1 to 64 letters, digits, '.', '_' or '-', not starting with '.' or '-'"
    if kind == "too_short":
        return "must name at least one"
    return _PLAIN.get(kind, error["msg"])


def problem_of(error: ErrorDetails, names_of_section: Sequence[str]) -> Problem:
    """Translate one pydantic error; `names_of_section` are the keys allowed where it happened."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        where = "section" if len(error["loc"]) == 1 else "key"
        hint = did_you_mean(key, names_of_section) or "allowed: " + ", ".join(names_of_section)
        return Problem(path, f"unknown {where}; {hint}")
    if error["type"] == "missing":
        return Problem(path, "is required and missing")
    found = _found(error["input"])
    near = did_you_mean(found, re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", ""))))
    message = f"{_allowed(error)}, found {found}" + (f"; {near}" if near else "")
    return Problem(path, message, fix=_SERVED_BY.get(f"{path}={found}"))


def raise_problems(problems: Sequence[Problem], *, label: str, lines: dict[str, int]) -> None:
    """Raise one `RecipeError` that lists every problem with its file, line and YAML path, if there is any."""
    if not problems:
        return
    told = []
    for problem in problems:
        where = _where(problem.path, label=label, lines=lines)
        told.append(
            f"{where}: {problem.path}: {problem.message}" + (f"\n    fix: {problem.fix}" if problem.fix else "")
        )
    count = "1 problem" if len(told) == 1 else f"{len(told)} problems"
    raise RecipeError(
        f"{count} in the recipe\n" + "\n".join(f"  {line}" for line in told),
        hint="every key with its type and meaning: gemma-tune recipes schema",
    )


def _where(path: str, *, label: str, lines: dict[str, int]) -> str:
    """`file:line` of the path or of its nearest parent; line 0 marks a value from the command line."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        line = lines.get(".".join(parts[:length]))
        if line is not None:
            return f"{label}:{line}" if line else "command line"
    return label
