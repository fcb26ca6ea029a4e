"""`gemma-tune train`."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.cli.console import Terminal, TerminalReporter
from gemma_tune.cli.report import print_report


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the interrupted run of this recipe from its last complete checkpoint."),
    ] = False,
    from_checkpoint: Annotated[
        int | None,
        typer.Option(
            "--from-checkpoint",
            metavar="STEP",
            min=0,
            help="As --resume, from the checkpoint of this step; newer ones are set aside.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a Gemma: check, load, answer, train, answer again, and say what came out."""
    from gemma_tune import pipeline
    from gemma_tune.recipe.load import load_recipe

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ())
    with TerminalReporter(terminal) as reporter:
        run = pipeline.train(loaded, reporter=reporter, resume=resume, from_step=from_checkpoint)
    print_report(terminal, run, as_json=as_json)
    if loaded.recipe.export.formats:
        pipeline.exports_of(run).require_passed()
