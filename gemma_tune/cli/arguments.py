"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that replace those of the recipe."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory that `gemma-tune train` made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
