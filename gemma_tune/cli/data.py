"""`gemma-tune data preview|audit|clear-cache`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from gemma_tune.cli.arguments import AsJson, Overrides
from gemma_tune.terminal import Terminal, TerminalReporter
from gemma_tune.text import format_bytes

data_app = typer.Typer(help="What is trained: look at it, audit it.", no_args_is_help=True)
RowsOrRecipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE|ROWS", help="A recipe, or a file of rows to look at as gemma-tiny would be trained on it."
    ),
]


@data_app.command("preview")
def preview(
    recipe: RowsOrRecipe,
    overrides: Overrides = None,
    num_rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
    side: Annotated[Literal["train", "eval"], typer.Option(help="Which rows.")] = "train",
    at: Annotated[str | None, typer.Option(help="Show the row that stands here, such as rows.jsonl:12.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model will see them, token by token, with what is trained marked; and the counts of all rows."""
    from gemma_tune.data.look.preview import preview_rows
    from gemma_tune.data.open import load_data, open_data
    from gemma_tune.machine.quiet import libraries_to
    from gemma_tune.recipe.load import load_recipe_or_rows

    terminal = Terminal()
    loaded = load_recipe_or_rows(recipe, overrides or ()).recipe
    with libraries_to(None):
        base, inputs = open_data(loaded)
        tokenizer, encoder, datasets = load_data(loaded, base=base, inputs=inputs)
    rows = preview_rows(datasets, tokenizer, control_ids=encoder.control_ids, side=side, count=num_rows, at=at)
    if as_json:
        terminal.json({"report": asdict(datasets.report), "rows": [asdict(row) for row in rows]})
        return
    for line in datasets.report.lines():
        terminal.plain(line)
    marked = terminal.out.is_terminal
    terminal.plain(
        "\nTrained tokens are "
        + ("green, control tokens inverse, every second token underlined." if marked else "between ⟦ and ⟧.")
    )
    for row in rows:
        terminal.plain(f"\n{row.where}: {row.num_tokens} tokens, {row.num_supervised} of them in the loss")
        for text, style in row.styled(colours=marked):
            terminal.result_inline(Text(text, style=style))
        terminal.plain("")


@data_app.command("audit")
def audit(
    recipe: RowsOrRecipe,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a web page.", metavar="FILE")] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="error|warning|KIND=N",
            help="End with exit code 1 at a finding of this severity, or at N or more findings of a kind.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what ruins a fine-tune: duplicates, leaks, damage, personal data, rows that do not fit."""
    from gemma_tune.cli.audit import parse_threshold, print_audit, threshold_passed
    from gemma_tune.data.look.survey import audit_data
    from gemma_tune.machine.quiet import libraries_to
    from gemma_tune.recipe.load import load_recipe_or_rows

    terminal = Terminal()
    loaded = load_recipe_or_rows(recipe, overrides or ())
    threshold = parse_threshold(fail_on) if fail_on else None
    with libraries_to(None), TerminalReporter(terminal) as reporter:
        report = audit_data(loaded.recipe, reporter=reporter)
    if html is not None:
        from gemma_tune.reporting.pages import write_audit_page

        write_audit_page(html, asdict(report), title=loaded.name)
    if as_json:
        terminal.json(asdict(report))
    else:
        print_audit(terminal, report)
    if html is not None:
        terminal.note(f"[green]✓[/] wrote {html}")
    if threshold is not None and threshold_passed(report, threshold):
        raise typer.Exit(1)


@data_app.command("clear-cache")
def clear_cache() -> None:
    """Remove the token cache; the next training encodes its rows again."""
    from gemma_tune.data.encode.cache import clear_cache as clear
    from gemma_tune.paths import cache_dir

    num_entries, num_bytes = clear()
    Terminal().note(f"[green]✓[/] removed {num_entries} entries, {format_bytes(num_bytes)}, of {cache_dir()}")
