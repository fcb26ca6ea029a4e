"""`gemma-tune push`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gemma_tune.cli.arguments import AsJson
from gemma_tune.terminal import Terminal, TerminalReporter
from gemma_tune.text import counted, format_bytes


def push(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIR", help="An exported directory, or a run with one export.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Only you may see it; a public one is refused.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; main unless given.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Push even what did not pass its check.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a finished export to the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN."""
    from gemma_tune.exporting import push as hub
    from gemma_tune.machine.quiet import libraries_to
    from gemma_tune.reporting.card import CARD_FILE

    terminal = Terminal()
    directory = hub.find_export(path)
    with TerminalReporter(terminal) as reporter, libraries_to(None):
        reporter.stage("push")
        reporter.detail(f"{directory} → {repo_id}")
        report = hub.push(directory, repo_id, private=private, revision=revision, commit_message=message, force=force)
    if as_json:
        terminal.json({"repo_id": repo_id} | asdict(report))
        return
    if CARD_FILE not in report.files:
        terminal.note(f"[yellow]![/] no model card: {escape(str(directory))} has no {CARD_FILE}")
    if report.left_out:
        terminal.note(f"[dim]not pushed: {escape(', '.join(report.left_out))}[/]")
    files = counted(len(report.files), "file")
    terminal.note(f"[green]✓[/] pushed {files}, {format_bytes(sum(report.files.values()))}")
    terminal.plain(report.url)
