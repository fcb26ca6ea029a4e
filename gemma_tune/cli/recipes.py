"""`gemma-tune recipes list|show|copy|schema`."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from gemma_tune.cli.arguments import AsJson
from gemma_tune.paths import RECIPES_DIR
from gemma_tune.terminal import Terminal
from gemma_tune.text import in_shell

recipes_app = typer.Typer(help="The recipes that ship with gemma-tune.", no_args_is_help=True)
RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.", show_default=False)]


@recipes_app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes with their goal and hardware."""
    rows = [(path.stem, *read_header(path)) for path in sorted(RECIPES_DIR.glob("*.yaml"))]
    if as_json:
        Terminal().json([{"name": name, "goal": goal, "hardware": hardware} for name, goal, hardware in rows])
        return
    Terminal().table(("recipe", "goal", "hardware"), rows)


@recipes_app.command("show")
def show(name: RecipeName) -> None:
    """Print a shipped recipe with its comments."""
    from gemma_tune.recipe.load import find_recipe

    Terminal().plain(find_recipe(Path(name)).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def copy(
    name: RecipeName,
    target: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to write it; NAME.yaml here unless given.", show_default=False)
    ] = Path(),
) -> None:
    """Copy a shipped recipe, to be edited."""
    from gemma_tune.recipe.commented import write_new
    from gemma_tune.recipe.load import find_recipe

    source = find_recipe(Path(name))
    target = target / source.name if target.is_dir() else target
    write_new(target, source.read_text(encoding="utf-8"))
    Terminal().note(f"[green]✓[/] wrote {target}; run it with: gemma-tune train {in_shell(target)}")


@recipes_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from gemma_tune.recipe.schema import Recipe

    Terminal().json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()})


def read_header(path: Path) -> tuple[str, str]:
    """Goal and hardware from the comment at the top of a recipe (`# Goal: …`, `# Hardware: …`)."""
    header = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    facts = {"goal": "", "hardware": ""}
    key = ""
    for line in header:
        if not line.startswith("#   "):  # else it continues the one before
            name, _, line = line.removeprefix("# ").partition(":")
            key = name.lower()
        if key in facts:
            facts[key] = f"{facts[key]} {line.lstrip('# ')}".strip()
    return facts["goal"], facts["hardware"]
