"""`gemma-tune validate`."""

from __future__ import annotations

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.terminal import Terminal


def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe without loading a model: keys, values, model name and data template."""
    from gemma_tune.data.rows.template import check_named
    from gemma_tune.models.resolve import resolve_model
    from gemma_tune.recipe.load import dump_recipe, load_recipe

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ())
    resolve_model(loaded.recipe.model.name)
    check_named(loaded.recipe.data)
    if as_json:
        terminal.json(loaded.recipe.model_dump(mode="json"))
        return
    terminal.plain(dump_recipe(loaded.recipe), end="")
    terminal.note(f"[green]✓[/] {loaded.path} is valid; above, every setting with its value")
