"""`gemma-tune report`."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape
from rich.text import Text

from gemma_tune.cli.arguments import AsJson, RunPath
from gemma_tune.cli.console import Terminal, format_bytes, format_seconds, make_table
from gemma_tune.runs.layout import RunDir, open_run
from gemma_tune.runs.record import read_manifest
from gemma_tune.runs.summary import RunSummary, read_summary


def report(run: RunPath, as_json: AsJson = False) -> None:
    """Show what came out of a run: losses, exact match, answers before and after, files."""
    opened = open_run(run)
    terminal = Terminal()
    if not opened.summary.is_file():
        manifest = read_manifest(opened)
        if as_json:
            terminal.json(asdict(manifest))
            return
        done = f"step {manifest.step}" + (f" of {manifest.total_steps}" if manifest.total_steps else "")
        terminal.plain(
            f"{opened.path}: {manifest.status} at {done}" + (f": {manifest.error}" if manifest.error else "")
        )
        return
    print_report(terminal, opened, as_json=as_json)


def print_report(terminal: Terminal, run: RunDir, *, as_json: bool) -> None:
    """Print the summary of a finished run."""
    summary = read_summary(run)
    if as_json:
        terminal.json({"run": str(run.path), **asdict(summary), "tokens_per_second": summary.tokens_per_second})
        return
    terminal.result(Text(f"\n{run.path}", style="bold"))
    terminal.result(
        f"{escape(summary.model)} · {summary.engine} · {summary.quantization} · {summary.precision} · "
        f"{summary.num_trainable:,} trained parameters"
    )
    terminal.result(
        f"{summary.train_rows:,} rows · {summary.steps:,} steps · {summary.num_tokens:,} tokens in "
        f"{format_seconds(summary.training_seconds)} ({summary.tokens_per_second:,.0f} tokens/s) · peak "
        f"{format_bytes(summary.peak_memory_bytes)}\n"
    )
    terminal.result(make_table(("", "before", "after"), _figures(summary), right=(1, 2)))
    for question in summary.questions:
        terminal.result("")
        terminal.result(Text(_shorten(question.question), style="bold"))
        terminal.result(_answer("before", question.before, "red" if question.before != question.expected else "green"))
        terminal.result(_answer("after", question.after, "green" if question.after == question.expected else "red"))
        if question.after != question.expected:
            terminal.result(_answer("expected", question.expected, "dim"))
    terminal.result("")
    files = [
        ("adapter", run.adapter),
        ("answers", run.answers),
        ("loss curve", run.loss_curve),
        ("log of the libraries", run.library_log),
    ]
    if summary.merged:
        files.insert(1, ("merged model", run.merged))
    terminal.result(make_table(("file", "where"), files))
    terminal.result("")
    terminal.result(make_table(("next", ""), _next_commands(run, summary)))


def _figures(summary: RunSummary) -> list[tuple[str, str | None, str | None]]:
    def loss(value: float | None) -> str | None:
        return None if value is None else f"{value:.3f}"

    def share(value: float | None) -> str | None:
        return None if value is None else f"{value:.1%}"

    return [
        (f"eval loss, {summary.eval_rows} rows", loss(summary.eval_loss_before), loss(summary.eval_loss_after)),
        (
            f"exact match, {summary.exact_match_rows} rows",
            share(summary.exact_match_before),
            share(summary.exact_match_after),
        ),
    ]


def _answer(label: str, text: str, style: str) -> Text:
    return Text.assemble((f"  {label:<9}", "dim"), (_shorten(text) or "(nothing)", style))


def _shorten(text: str, *, length: int = 160) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _next_commands(run: RunDir, summary: RunSummary) -> list[tuple[str, str]]:
    commands = [("ask it", f'gemma-tune generate {run.path} --prompt "…"')]
    if not summary.merged:
        commands.append(("merge it", f"gemma-tune merge {run.path}"))
    return [*commands, ("this again", f"gemma-tune report {run.path}")]
