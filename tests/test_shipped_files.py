"""Every file that ships is complete, loads, and belongs to nobody's machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gemma_tune.data.inputs import detect_template
from gemma_tune.data.rows.template import load_template
from gemma_tune.models.catalogue import find_model
from gemma_tune.paths import DATA_TEMPLATES_DIR, RECIPES_DIR
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(RECIPES_DIR.glob("*.yaml"))
TEMPLATES = sorted(DATA_TEMPLATES_DIR.glob("*.yaml"))
HEADER = ("Goal", "Hardware", "Command", "Expect", "Licence")
MAX_FILE_BYTES = 9_000_000
# Written although it is the default: a recipe without its model's name would not say what it is about.
ALWAYS_WRITTEN = {"model.name", "data.source", "data.max_seq_tokens"}
BINARY_SUFFIXES = {".safetensors", ".png", ".model"}

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def _header(path: Path) -> dict[str, str]:
    """The fields of the comment above the first setting; a field goes on until the next one or an empty comment."""
    fields: dict[str, str] = {}
    name = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        field = re.match(r"([A-Z][a-z]+): +(.*)", text)
        if field:
            name = field[1]
            fields[name] = field[2]
        elif text and name:
            fields[name] += " " + text
        else:
            name = None
    return fields


def _tracked_files() -> list[Path]:
    """What git has or would take in; an exported archive without git counts as a whole."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode("utf-8").split("\0") if name]
    return [file for file in files if file.is_file()]


def test_the_promised_recipes_are_there() -> None:
    small = {"quickstart", "gemma-2b-dolly", "gemma-3-270m-dolly", "gemma-3-4b-it-dolly"}
    large = {"gemma-7b-dolly", "gemma-7b-it-dolly-t4", "gemma-2-9b-it-dolly", "gemma-4-e4b-it-dolly"}
    assert small | large <= {path.stem for path in RECIPES}


DOLLY_COLUMNS = ("instruction", "context", "response", "category")


@each_recipe
def test_recipe_is_valid_and_its_model_and_template_exist(path: Path) -> None:
    recipe = load_recipe(path).recipe
    model = find_model(recipe.model.name)
    template = (
        detect_template(DOLLY_COLUMNS, prefers_chat=model.is_instruction_tuned)
        if recipe.data.template == "auto"
        else load_template(recipe.data.template)
    )
    assert template is not None
    assert template.kind == ("chat" if model.is_instruction_tuned else "text"), (
        "an -it model is trained on its own turns"
    )


@each_recipe
def test_recipe_has_its_header(path: Path) -> None:
    header = _header(path)
    assert tuple(header) == HEADER
    assert all(header.values())
    assert header["Command"] == f"gemma-tune train recipes/{path.name}"


@each_recipe
def test_recipe_says_only_what_differs_from_the_defaults(path: Path) -> None:
    written: dict[str, dict[str, Any]] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    defaults = Recipe.model_validate({"data": {"source": "x", "max_seq_tokens": 8}}).model_dump(mode="json")
    same = [
        f"{section}.{field}"
        for section, fields in written.items()
        for field, value in fields.items()
        if value == defaults[section][field] and f"{section}.{field}" not in ALWAYS_WRITTEN
    ]
    assert not same


@each_recipe
def test_recipe_is_loaded_by_its_bare_name(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path(path.stem)).recipe == load_recipe(path).recipe


def test_the_t4_recipe_asks_for_no_bfloat16() -> None:
    recipe = load_recipe(RECIPES_DIR / "gemma-7b-it-dolly-t4.yaml").recipe
    assert "bfloat16" not in (recipe.model.dtype, recipe.export.dtype)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template_loads_by_name(path: Path) -> None:
    template = load_template(path.stem)
    assert template.name == path.stem
    assert template.about


def test_no_file_is_too_large_for_git() -> None:
    too_large = {str(file.relative_to(ROOT)): file.stat().st_size for file in _tracked_files()}
    too_large = {name: size for name, size in too_large.items() if size > MAX_FILE_BYTES}
    assert not too_large


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    # Written in pieces, so that this file does not name them itself.
    home = re.compile("(?:/(?:home|Users|root|work)/|" + r"[A-Z]:\\+Users\\+)(?P<name>[A-Za-z0-9_.-]+)")
    # Planted by tests of what must not be passed on.
    invented = {"al", "alice", "bob", "eve", "Martha", "me", "somebody", "x"}
    found = []
    for file in _tracked_files():
        if file.suffix in BINARY_SUFFIXES:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if any(match["name"] not in invented for match in home.finditer(line)):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found
