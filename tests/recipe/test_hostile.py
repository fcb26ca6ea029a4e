"""Whatever stands in a recipe, the answer is a recipe or a sentence: every number, and YAML of every kind."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from gemma_tune.data.rows.template import load_template
from gemma_tune.errors import DataError, RecipeError
from gemma_tune.recipe.keys import bounds_of, field_at, section_at
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import Recipe

ROW = "Zyxwvut 0171-5550199"  # stands in the file, as a row would
RECIPE = f"""model:
  name: gemma-tiny  # {ROW}
data:
  mix:
    - {{source: a.jsonl, weight: 2}}
    - {{source: b.jsonl, weight: 1.5}}
  max_seq_tokens: 64
  columns: {{instruction: "q", response: 'a'}}
training: {{learning_rate: 2e-4, seed: 3, packing: false}}
lora:
  targets: [q_proj, v_proj]
run:
  name: mine
"""
TEMPLATE = "name: t\nkind: text\nprompt: '{{ a }}'\nresponse: '{{ b }}'\nexample: {a: x}\n"


def numbers_of(section: type[BaseModel], path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every number of the schema, entries of lists included."""
    for name, field in section.model_fields.items():
        here = (*path, name)
        inner = section_at(Recipe, here)
        if inner is not None:
            yield from numbers_of(inner, (*here, 0) if name == "mix" else here)
        elif {int, float} & set(_types_in(field.annotation)):
            yield here


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for each in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _types_in(each)


NUMBERS = list(numbers_of(Recipe))
VALUES = [10**20, -(10**20), 2**63, 1e300, -1e300, math.inf, -math.inf, math.nan, -1, 0, 1e-300, True, "text", [1], {}]


def _as_yaml(value: object) -> str:
    words = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan", "True": "true"}
    return words.get(str(value), str(value))


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: ".".join(map(str, place)))
def test_every_number_has_two_bounds_and_is_refused_outside_of_them(place: tuple[str | int, ...]) -> None:
    field = field_at(Recipe, place)
    assert field is not None
    bounds = bounds_of(field)
    assert bounds.startswith("from ") or " and " in bounds
    path = ".".join(map(str, place))
    for value in VALUES:
        overrides = ["data.mix=[{source: a, weight: 1}]", "data.source="] if "mix" in place else []
        try:
            recipe: Any = load_recipe(Path("quickstart"), [*overrides, f"{path}={_as_yaml(value)}"]).recipe
        except RecipeError as error:
            assert path in error.message
            if isinstance(value, int | float | str) and f"{path}: must" in error.message:
                assert f"number {bounds}, found" in error.message
            continue
        for part in place:
            recipe = recipe[part] if isinstance(part, int) else getattr(recipe, part)
        assert recipe is None or (type(recipe) in (int, float) and -1 < recipe <= 1e9)


def test_what_the_schema_counts_as_numbers() -> None:
    assert len(NUMBERS) > 35 and ("data", "mix", 0, "weight") in NUMBERS and ("training", "max_minutes") in NUMBERS


# ruff: noqa: E501
HOSTILE = [
    "2001-99-99", "!!int abc", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary '%'", "!!set {a}", "!!omap [a: b]",
    "!<%ff> a", "!x!y z", "&a [*a]", "*nobody", "<<: {a: 1}", "? [a]\n: b", "'\\U99999999'", '"\\U99999999"', '"\\xZZ"',
    "%YAML 99999999999999999.1\n---\n", "%TAG ! x\n", "---\na: 1\n---\n", "9" * 5000, "0x" + "f" * 5000, "1e999999999",
    "-.inf", ".nan", "0b_", "0o9", "[" * 900, "{a: " * 900, "- " * 900, "'", '"', "|9\n", ">-\n", "\t", ":", "@", "`",
    "~", "null", "=", "<<", "\x00", "\x07", "\u2028", "\ufeff", "]", "}", "#", "a: b: c", "data: {}", "data:", "[a, b]: c",
    "model: [1]", "training: text of a row", "1: 2", "true: 1",
]  # fmt: skip


def test_mutated_files_are_answered_in_a_sentence(tmp_path: Path) -> None:
    """300 of them, and as many templates: a sentence that names the file, and nothing that stands in a row."""
    dice, path, num_refused = random.Random(0), tmp_path / "mine.yaml", 0
    for number in range(300):
        is_template = number % 3 == 2
        text = TEMPLATE if is_template else RECIPE
        for _ in range(dice.randint(1, 3)):
            at = dice.randint(0, len(text))
            gap = dice.choice(["", " ", "\n", "\n  "])
            text = text[:at] + gap + dice.choice(HOSTILE) + dice.choice(["", text[at:]])
        content = text.encode(dice.choice(["utf-8"] * 8 + ["utf-16", "cp1252"]), "replace")
        path.write_bytes(content if dice.random() < 0.9 else content[: dice.randrange(len(content))] + b"\xff\xc3")
        try:
            if is_template:
                load_template(path)
            else:
                load_recipe(path)
        except (RecipeError, DataError) as error:
            num_refused += 1
            told = f"{error.message} {error.hint}"
            assert "mine" in told and "Zyxwvut" not in told and "5550199" not in told and len(told) < 5000, text
    assert 200 < num_refused < 300


@pytest.mark.parametrize("value", HOSTILE)
def test_overrides_are_answered_in_a_sentence(value: str) -> None:
    for path in ("training.seed", "run.name", "lora.targets", "data.columns", "method", "data.mix"):
        try:
            load_recipe(Path("quickstart"), [f"{path}={value}"])
        except RecipeError as error:
            assert path.partition(".")[0] in error.message


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(RecipeError, match=name):
            load_recipe(tmp_path / name)
        with pytest.raises(DataError, match=name):
            load_template(tmp_path / name)
