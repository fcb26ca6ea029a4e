"""From a YAML file and `section.field=value` overrides to a frozen `Recipe`, or to one error with every problem."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gemma_tune.errors import RecipeError
from gemma_tune.paths import RECIPES_DIR
from gemma_tune.recipe.keys import refuse_foreign
from gemma_tune.recipe.problems import Problem, problem_of, raise_problems
from gemma_tune.recipe.rules import check_rules
from gemma_tune.recipe.schema import Recipe
from gemma_tune.secrets import find_secrets
from gemma_tune.text import in_shell, suggestion
from gemma_tune.yaml_io import dump_yaml, read_yaml, read_yaml_text

MAX_RECIPE_BYTES = 256 * 1024
_ROWS_SUFFIXES = frozenset({".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".xls"})
# For a look at rows without a recipe.
ROWS_MAX_SEQ_TOKENS = 2048
# Keys that hold a credential elsewhere. A recipe is copied into runs, reports and model cards, so it never holds one.
SECRET_WORDS = ("token", "api_key", "apikey", "password", "secret")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with what is needed to record and to explain it."""

    recipe: Recipe  # the validated settings, defaults filled in
    name: str  # the file's stem; names the run when the recipe does not
    path: Path  # the file that was read
    text: str  # the file exactly as it was given
    overrides: tuple[str, ...]  # the `section.field=value` arguments, in order
    given: str  # the file or the name, as it was written


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override, validate and freeze a recipe.

    `path` may also be the name of a shipped recipe, such as `quickstart`.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or holds mistakes; all mistakes are in the one message.
    """
    given, path = str(path), find_recipe(path)
    text = read_yaml_text(path, max_bytes=MAX_RECIPE_BYTES, what="a recipe", error=RecipeError)
    values, lines = parse_yaml(text, label=str(path))
    for override in overrides:
        _apply_override(values, lines, override)
    recipe = _validate(values, label=str(path), lines=lines)
    return LoadedRecipe(recipe, path.stem, path, text, tuple(overrides), given)


def load_recipe_or_rows(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe; or, for a directory or a file that is not YAML, the defaults with it as `data.source`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    is_recipe = path.suffix.lower() in (".yaml", ".yml") or (len(path.parts) == 1 and not path.suffix)
    if is_recipe and not path.is_dir():
        return load_recipe(path, overrides)
    values: dict[str, Any] = {"data": {"source": str(path), "max_seq_tokens": ROWS_MAX_SEQ_TOKENS}}
    lines = {"data": 0}
    for override in overrides:
        _apply_override(values, lines, override)
    recipe = _validate(values, label="command line", lines=lines)
    return LoadedRecipe(recipe, path.name, path, "", tuple(overrides), str(path))


def read_data_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read `data.field=value` for rows that have no recipe yet; raises a RecipeError as `load_recipe` does."""
    decided = {"source": "rows", "max_seq_tokens": ROWS_MAX_SEQ_TOKENS}
    values: dict[str, Any] = {"data": {}}
    lines = {"data": 0}
    for setting in settings:
        _apply_override(values, lines, setting)
    given = list(values["data"])
    if len(values) > 1 or not {*decided, "template", "columns", "mix"}.isdisjoint(given):
        raise RecipeError(
            f"{' '.join(settings)}: only settings of data are given here, without source, template, columns and length",
            hint="name columns with --column FIELD=COLUMN, and change the rest in the recipe that is written",
        )
    values["data"] |= decided
    recipe = _validate(values, label="command line", lines=lines)
    return {name: getattr(recipe.data, name) for name in given}


def find_recipe(path: Path) -> Path:
    """Return the recipe file that `path` names: a file, or a shipped recipe by name or as `recipes/<name>.yaml`."""
    if path.is_file():
        is_yaml = path.suffix.lower() in (".yaml", ".yml")  # rows.csv.yaml is a recipe for rows.csv
        if not is_yaml and _ROWS_SUFFIXES.intersection(suffix.lower() for suffix in path.suffixes[-2:]):
            raise RecipeError(
                f"{path} holds rows, and a recipe is expected",
                hint=f"gemma-tune init {in_shell(path)} writes a recipe for them",
            )
        return path
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path} is a pipe or a device, and a recipe is a file", hint="write it to a .yaml file")
    if path.is_dir():
        raise RecipeError(
            f"{path} is a directory, not a recipe", hint="give a .yaml file; shipped ones: gemma-tune recipes list"
        )
    shipped = RECIPES_DIR / f"{path.stem}.yaml"
    if str(path) in (path.stem, f"{path.stem}.yaml", f"recipes/{path.stem}.yaml") and shipped.is_file():
        return shipped
    near = suggestion(path.stem, [recipe.stem for recipe in RECIPES_DIR.glob("*.yaml")])
    raise RecipeError(f"no such recipe: {path}{near}", hint="shipped recipes: gemma-tune recipes list")


def parse_yaml(text: str, *, label: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Parse the text of a recipe into its sections, and the 1-based line of every path."""
    tree, lines = read_yaml(text, label=label, error=RecipeError)
    if isinstance(tree, dict):
        return tree, lines
    found = {type(None): "nothing", list: "a list", str: "text"}.get(type(tree), "a number")
    raise RecipeError(
        f"{label}: a recipe is a mapping of sections, found {found}", hint="see gemma-tune recipes show quickstart"
    )


def _apply_override(values: dict[str, Any], lines: dict[str, int], override: str) -> None:
    """Set one `section.field=value`; the value is read as YAML, an empty one is null."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or (len(parts) < 2 and parts != ["method"]):
        raise RecipeError(
            f"cannot read the override {override!r}",
            hint="write section.field=value, for example training.max_steps=20",
        )
    try:
        value, _ = read_yaml(text, label="command line", error=RecipeError)
    except RecipeError:
        value = text  # a Windows path, *.jsonl or a lone colon: plain text, as the shell gave it
    section: Any = values
    if isinstance(word := values.get("method"), str) and len(parts) > 1:
        values["method"] = {"name": word}
    *sections, last = parts
    for part in sections:
        key = _key_in(section, part, path=path)
        if isinstance(section, dict) and section.get(key) is None:
            section[key] = {}
        section = section[key]
    section[_key_in(section, last, path=path)] = value
    lines[path.strip()] = 0


def _key_in(section: Any, part: str, *, path: str) -> Any:
    """The key or the index that a part of an override's path means."""
    if isinstance(section, dict):
        return part
    if isinstance(section, list) and part.isdecimal() and len(part) < 9 and int(part) < len(section):
        return int(part)
    raise RecipeError(f"the override of {path} looks for {part!r} in a value which is not a section")


def _validate(values: dict[str, Any], *, label: str, lines: dict[str, int]) -> Recipe:
    # An empty section (`lora:` with every line commented out) is a section of defaults.
    values = {name: {} if section is None else section for name, section in values.items()}
    raise_problems(_secrets(values), label=label, lines=lines)
    missing = _missing_source(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        found = [problem_of(item, Recipe) for item in error.errors(include_url=False)]
        refuse_foreign(values, label=label)
        raise_problems(found + missing, label=label, lines=lines)
        raise
    raise_problems(missing + check_rules(recipe), label=label, lines=lines)
    if "learning_rate" in recipe.training.model_fields_set:
        return recipe
    rate = recipe.method_facts.default_learning_rate
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": rate})})


def _missing_source(values: Mapping[str, Any]) -> list[Problem]:
    """Rows have to come from somewhere; told along with mistakes in single fields, before the rules are checked."""
    data = values.get("data")
    if not isinstance(data, Mapping) or data.get("source") is not None or data.get("mix"):
        return []
    return [Problem("data.source", "is required and missing")]


def _secrets(values: Mapping[str, Any]) -> list[Problem]:
    """Keys and values that would hold a credential (S5)."""
    return [
        Problem(
            path,
            "a recipe never holds a credential: it is copied into runs and model cards",
            fix="hf auth login, or set HF_TOKEN",
        )
        for path, key, value in _texts_in("", values)
        if any(word == key or key.endswith(f"_{word}") for word in SECRET_WORDS)
        or value.startswith("hf_")
        or any(find_secrets(value))
    ]


def _texts_in(path: str, value: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Path, last key and value of every text of a recipe."""
    if isinstance(value, str):
        yield path, key, value
    if key == "columns":
        return  # names of the rows' columns, which are masked where they are shown
    for name, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from _texts_in(f"{path}.{name}" if path else str(name), item, str(name))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))
