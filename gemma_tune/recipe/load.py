"""From a YAML file and `section.field=value` overrides to a frozen `Recipe`, or to one error with every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from gemma_tune.errors import RecipeError
from gemma_tune.paths import RECIPES_DIR
from gemma_tune.recipe.problems import Problem, problem_of, raise_problems
from gemma_tune.recipe.rules import check_rules
from gemma_tune.recipe.schema import Recipe
from gemma_tune.secrets import find_secrets
from gemma_tune.text import did_you_mean
from gemma_tune.yaml_io import dump_yaml, read_yaml_tree, yaml_errors

MAX_RECIPE_BYTES = 256 * 1024
# For a look at rows without a recipe.
ROWS_MAX_SEQ_TOKENS = 2048
# Keys that hold a credential elsewhere. A recipe is copied into runs, reports and model cards, so it never holds one.
SECRET_WORDS = ("token", "api_key", "apikey", "password", "secret")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with what is needed to record and to explain it.

    Attributes:
        recipe: the validated settings, defaults filled in.
        name: the file's stem; names the run when the recipe does not.
        path: the file that was read.
        text: the file exactly as it was given.
        overrides: the `section.field=value` arguments, in order.
    """

    recipe: Recipe
    name: str
    path: Path
    text: str
    overrides: tuple[str, ...]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override, validate and freeze a recipe.

    `path` may also be the name of a shipped recipe, such as `quickstart`.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or holds mistakes; all mistakes are in the one message.
    """
    path = find_recipe(path)
    text = _read_text(path)
    values, lines = parse_yaml(text, label=str(path))
    for override in overrides:
        _apply_override(values, lines, override)
    recipe = _validate(values, label=str(path), lines=lines)
    return LoadedRecipe(recipe=recipe, name=path.stem, path=path, text=text, overrides=tuple(overrides))


def load_recipe_or_rows(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe; or, for a file that is no YAML, the defaults with that file as `data.source`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    is_recipe = path.suffix.lower() in (".yaml", ".yml") or (len(path.parts) == 1 and not path.suffix)
    if is_recipe:
        return load_recipe(path, overrides)
    values: dict[str, Any] = {"data": {"source": str(path), "max_seq_tokens": ROWS_MAX_SEQ_TOKENS}}
    lines = {"data": 0}
    for override in overrides:
        _apply_override(values, lines, override)
    recipe = _validate(values, label="command line", lines=lines)
    return LoadedRecipe(recipe=recipe, name=path.name, path=path, text="", overrides=tuple(overrides))


def find_recipe(path: Path) -> Path:
    """Return the recipe file that `path` names: a file, or a shipped recipe by name or as `recipes/<name>.yaml`."""
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(
            f"{path} is a directory, not a recipe", hint="give a .yaml file; shipped ones: gemma-tune recipes list"
        )
    shipped = RECIPES_DIR / f"{path.stem}.yaml"
    if str(path) in (path.stem, f"{path.stem}.yaml", f"recipes/{path.stem}.yaml") and shipped.is_file():
        return shipped
    near = did_you_mean(path.stem, [recipe.stem for recipe in RECIPES_DIR.glob("*.yaml")])
    raise RecipeError(
        f"no such recipe: {path}" + (f"; {near}" if near else ""), hint="shipped recipes: gemma-tune recipes list"
    )


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_RECIPE_BYTES // 1024} KiB, which no recipe is")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x})", hint="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from None


def parse_yaml(text: str, *, label: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Parse YAML 1.2 into plain values, and the line of every path.

    YAML 1.2 reads `2e-4` as a number and `no` as text; duplicate keys, anchors and aliases are refused.

    Returns:
        The values, and a map from `section.field` to its 1-based line.
    """
    with yaml_errors(label, error=RecipeError):
        tree = read_yaml_tree(text)
    if not isinstance(tree, CommentedMap):
        raise RecipeError(
            f"{label}: a recipe is a mapping of sections, found {_kind(tree)}",
            hint="see gemma-tune recipes show quickstart",
        )
    lines: dict[str, int] = {}
    return _plain(tree, path="", label=label, lines=lines), lines


def _kind(value: object) -> str:
    return {type(None): "nothing", CommentedSeq: "a list"}.get(type(value), f"'{value}'")


def _plain(node: Any, *, path: str, label: str, lines: dict[str, int]) -> Any:
    """Ruamel's round-trip tree as dict, list and scalars; records the line of each path."""
    anchor = getattr(getattr(node, "anchor", None), "value", None)
    if anchor:
        raise RecipeError(
            f"{label}: {path}: anchors (&{anchor}) are not allowed in a recipe", hint="write the value out"
        )
    if isinstance(node, CommentedMap):
        plain = {}
        for key, value in node.items():
            name = f"{path}.{key}" if path else str(key)
            lines[name] = node.lc.key(key)[0] + 1
            plain[str(key)] = _plain(value, path=name, label=label, lines=lines)
        return plain
    if isinstance(node, CommentedSeq):
        return [_plain(value, path=f"{path}.{index}", label=label, lines=lines) for index, value in enumerate(node)]
    kind = next((scalar for scalar in (bool, int, float, str) if isinstance(node, scalar)), None)
    return node if kind is None else kind(node)


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
        value = _plain(read_yaml_tree(text), path=path, label="command line", lines={})
    except YAMLError:
        value = text  # a Windows path or a lone colon: plain text, as the shell gave it
    section: Any = values
    if isinstance(word := values.get("method"), str) and len(parts) > 1:
        values["method"] = {"name": word}
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise RecipeError(f"the override {override!r} goes into {part!r}, which is not a section")
    section[parts[-1]] = value
    lines[path.strip()] = 0


def _validate(values: dict[str, Any], *, label: str, lines: dict[str, int]) -> Recipe:
    # An empty section (`lora:` with every line commented out) is a section of defaults.
    values = {name: {} if section is None else section for name, section in values.items()}
    raise_problems(_secrets(values), label=label, lines=lines)
    missing = _missing_source(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        found = [problem_of(item, _names_at(item["loc"])) for item in error.errors(include_url=False)]
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
            f"{section}.{key}",
            "a recipe never holds a credential: it is copied into runs and model cards",
            fix="hf auth login, or set HF_TOKEN",
        )
        for section, fields in values.items()
        if isinstance(fields, Mapping)
        for key, value in fields.items()
        if isinstance(value, str)
        and (
            any(word == key or key.endswith(f"_{word}") for word in SECRET_WORDS)
            or value.startswith("hf_")
            or any(find_secrets(value))
        )
    ]


def _names_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed in the section where an unknown key was found."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))
