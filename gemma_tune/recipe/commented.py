"""A new recipe file: only what differs from the defaults, with the reason next to a value."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from gemma_tune.disk import cannot_write
from gemma_tune.errors import RecipeError
from gemma_tune.recipe.schema import Recipe
from gemma_tune.yaml_io import yaml_scalar

_LINE_WIDTH = 79  # of a terminal; a value that is longer stays whole
_COMMENT_COLUMN = 34


@dataclass(frozen=True)
class Setting:
    """One line of a recipe. `path` is `section.field`; `why` stands behind the value."""

    path: str
    value: str | float | bool | Mapping[str, str]
    why: str = ""


def format_recipe(header: Mapping[str, str], settings: Sequence[Setting]) -> str:
    """The text of a recipe file: header comments, then the settings by section, in the order of the schema."""
    width = max(len(key) for key in header) + 1
    lines = []
    for key, text in header.items():
        indents = f"# {key + ':':<{width}} ", f"# {'':<{width}} "
        lines += _wrapped(text, *indents)
    for section in Recipe.model_fields:
        own = [setting for setting in settings if setting.path.startswith(f"{section}.")]
        lines += ["", f"{section}:"] if own else []
        lines += [line for setting in own for line in _lines(setting)]
    return "\n".join(lines) + "\n"


def _lines(setting: Setting) -> list[str]:
    """The setting with its reason behind it, or above it where that would be too long a line."""
    text = f"  {setting.path.partition('.')[2]}: {_value(setting.value)}"
    line = f"{text:<{_COMMENT_COLUMN}}  # {setting.why}" if setting.why else text
    if not setting.why or len(line) <= _LINE_WIDTH:
        return [line]
    return [*_wrapped(setting.why, "  # ", "  # "), text]


def _wrapped(text: str, first: str, others: str) -> list[str]:
    """Lines that begin with `first` and `others`, broken at spaces alone: a name with a hyphen stays whole."""
    return wrap(
        text,
        _LINE_WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(key)}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return yaml_scalar(value)
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML


def write_new(path: Path, text: str) -> None:
    """Write a recipe file that was not there.

    Raises:
        RecipeError: it is there, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    except FileExistsError:
        raise RecipeError(f"{path} exists already, and is not overwritten", hint="give another file name") from None
    except OSError as error:
        raise cannot_write(path, error, error=RecipeError) from None
