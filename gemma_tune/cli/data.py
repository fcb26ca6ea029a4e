"""`gemma-tune data`."""

from __future__ import annotations

from dataclasses import asdict

from rich.text import Text

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.cli.console import Terminal


def show_data(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what would be trained: counts, lengths, and one row as the model sees it, its supervised text marked."""
    from gemma_tune import pipeline
    from gemma_tune.data.build import format_sample
    from gemma_tune.data.template import load_template
    from gemma_tune.engines.quiet import libraries_to
    from gemma_tune.models.fetch import fetch_model
    from gemma_tune.recipe.load import load_recipe

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ()).recipe
    with libraries_to(None):
        template = load_template(loaded.data.template)
        base = fetch_model(loaded.model.name, revision=loaded.model.revision)
        tokenizer, _, datasets = pipeline.load_data(loaded, directory=base.directory, template=template)
    if as_json:
        terminal.json(asdict(datasets.report))
        return
    for line in datasets.report.lines():
        terminal.plain(line)
    terminal.plain("\nOne row, as the model sees it; what is trained is marked:\n")
    marked = terminal.out.is_terminal
    for text, is_supervised in format_sample(datasets, tokenizer):
        terminal.result_inline(
            Text(text, style="bold green") if is_supervised and marked else Text(f"⟦{text}⟧" if is_supervised else text)
        )
    terminal.plain("")
