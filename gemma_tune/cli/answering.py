"""Options that the commands share which ask a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SAMPLING = "How tokens are chosen"
_LENGTH = "When an answer ends"

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A run, an adapter, a merged directory, a GGUF file, or a model name.",
        show_default=False,
    ),
]
TemplateName = Annotated[str | None, typer.Option(help="Data template; a run brings its own.", show_default=False)]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model of a run, without its adapter.")]

SamplerName = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        help="greedy, random, top-k, top-p, min-p, beam, or your own function: module:function or file.py:function. "
        "Left out, the options below say which.",
        show_default=False,
        rich_help_panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Above 1 wilder, below tamer; 0 is greedy.", show_default=False, rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option(help="Draw among the k likeliest.", show_default=False, rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw among the likeliest of this mass.", show_default=False, rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Draw among those at least this share as likely as the likeliest.",
        show_default=False,
        rich_help_panel=_SAMPLING,
    ),
]
Beams = Annotated[
    int | None,
    typer.Option("--beams", help="Follow this many continuations.", show_default=False, rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 repeats less.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int, typer.Option(help="Of what is drawn.", rich_help_panel=_SAMPLING)]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest answer, in tokens: 256, or what --max-length leaves.",
        show_default=False,
        rich_help_panel=_LENGTH,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest prompt and answer together, in tokens.", show_default=False, rich_help_panel=_LENGTH
    ),
]
StopStrings = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="A text that ends the answer and is left out of it; may be given several times.",
        show_default=False,
        rich_help_panel=_LENGTH,
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Write JSON lines to this file; the same command goes on where a killed one stopped.",
        show_default=False,
    ),
]
