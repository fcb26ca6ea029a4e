"""`gemma-tune validate`."""

from rich.markup import escape

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.terminal import Terminal


def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe without loading a model: keys, values, model, data template, first rows, export formats."""
    from gemma_tune.data.rows.template import named_templates
    from gemma_tune.flows.check_base import check_base
    from gemma_tune.models.fetch import fetch_model
    from gemma_tune.models.resolve import resolve_model
    from gemma_tune.recipe.load import dump_recipe, load_recipe
    from gemma_tune.runs.warm_start import find_adapter

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ())
    named = resolve_model(loaded.recipe.model.name)
    named_templates(loaded.recipe.data)
    is_here = named.kind != "hub" and named.path.is_dir()
    notes = check_base(loaded.recipe, named.config, named.path if is_here else None) if named.config else ()
    base = fetch_model(named.name) if is_here else None
    if loaded.recipe.model.adapter:
        found = find_adapter(loaded.recipe.model.adapter, lora=loaded.recipe.lora, base=base)
        notes += (found.note,) if found.note else ()
    if base:
        from gemma_tune.flows.check_rows import check_rows

        notes += check_rows(loaded.recipe, base)
    if as_json:
        terminal.json(loaded.recipe.model_dump(mode="json"))
        return
    terminal.plain(dump_recipe(loaded.recipe), end="")
    for note in notes:
        terminal.note(f"[yellow]![/] {escape(note)}")
    terminal.note(f"[green]✓[/] {escape(loaded.given)} is valid; above, every setting with its value")
