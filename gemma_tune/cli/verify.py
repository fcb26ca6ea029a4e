"""`gemma-tune verify`."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_tune.cli.arguments import AsJson
from gemma_tune.cli.export import BaseName, Positions, print_outcome
from gemma_tune.terminal import Terminal, TerminalReporter


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER|EXPORT", help="What was exported, or an exported directory.")
    ],
    of: Annotated[Path | None, typer.Option(help="The run or adapter that an EXPORT outside of its run is of.")] = None,
    base: BaseName = None,
    positions: Positions = None,
    as_json: AsJson = False,
) -> None:
    """Run exports again and compare them with base + adapter. Exit code 1: one did not pass."""
    from gemma_tune.flows.export import verify_model
    from gemma_tune.machine.quiet import libraries_to

    terminal = Terminal()
    with TerminalReporter(terminal) as reporter, libraries_to(None):
        outcome = verify_model(path, of=of, base=base, num_positions=positions, reporter=reporter)
    print_outcome(terminal, outcome, as_json=as_json)
