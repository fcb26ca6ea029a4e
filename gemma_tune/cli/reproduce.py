"""`gemma-tune reproduce`."""

from typing import Annotated

import typer

from gemma_tune.cli.arguments import AsJson, RunPath
from gemma_tune.runs.layout import open_run
from gemma_tune.terminal import Terminal, TerminalReporter


def reproduce(
    run: RunPath,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what differs between this machine and the run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a run again beside it and compare the adapters bit for bit. Exit code 1: they differ.

    With --check: exit code 1 when something differs from what the run was trained with.
    """
    from gemma_tune.flows.reproduce import reproduce_run

    terminal = Terminal()
    with TerminalReporter(terminal) as reporter:
        found = reproduce_run(open_run(run), reporter=reporter, check_only=check)
    if as_json:
        new_run = str(found.run.path) if found.run is not None else None
        terminal.json({"differences": found.differences, "run": new_run, "equal": None if check else found.is_equal})
    elif check:
        for line in found.differences or ["nothing differs from what the run was trained with"]:
            terminal.plain(line)
    elif found.run is not None and found.adapters is not None:
        verdict = "equal, bit for bit" if found.is_equal else "different"
        terminal.plain(f"{found.run.path}: the adapter is {verdict}")
        for name, sha256 in zip(("then", "now"), found.adapters, strict=True):
            terminal.plain(f"  {name}  {sha256}")
    if found.differences if check else not found.is_equal:
        raise typer.Exit(1)
