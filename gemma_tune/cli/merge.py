"""`gemma-tune merge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_tune.cli.arguments import AsJson, RunPath
from gemma_tune.cli.console import Terminal, TerminalReporter, format_bytes
from gemma_tune.runs.layout import open_run


def merge(
    run: RunPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to write; RUN/merged unless given.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Precision of the weights; auto keeps the base's."),
    ] = "auto",
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in 10^9 bytes.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Merge a run's adapter into its 16-bit base: a Hugging Face directory that plain transformers loads."""
    from gemma_tune import pipeline
    from gemma_tune.engines.quiet import libraries_to

    terminal = Terminal()
    opened = open_run(run)
    target = output or opened.merged
    with TerminalReporter(terminal) as reporter, libraries_to(None):
        reporter.stage("merge")
        report = pipeline.merge_run(
            opened, dtype=dtype, max_shard_bytes=int(max_shard_gb * 1e9), reporter=reporter, output=target
        )
    if as_json:
        terminal.json({**asdict(report), "output_dir": str(target)})
        return
    changed = report.tensors_merged + report.tensors_replaced
    terminal.note(
        f"[green]✓[/] merged {changed} of {report.tensors_total} tensors in {report.seconds:.1f} s: "
        f"{format_bytes(report.weight_bytes)} in {report.dtype}, checked"
    )
    terminal.plain(str(target))
