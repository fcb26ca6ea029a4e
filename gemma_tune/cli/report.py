"""`gemma-tune report`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from gemma_tune.cli.arguments import AsJson
from gemma_tune.cli.evaluate import print_stored_evaluation
from gemma_tune.cli.export import print_exports
from gemma_tune.errors import RunError
from gemma_tune.reporting.facts import differing_settings, gather_facts, results_side_by_side
from gemma_tune.reporting.write_report import write_report, write_reports
from gemma_tune.runs.evaluation import read_evaluation
from gemma_tune.runs.index import describe_state
from gemma_tune.runs.layout import RunDir, open_run
from gemma_tune.runs.summary import RunSummary, read_summary
from gemma_tune.terminal import Terminal
from gemma_tune.text import format_bytes, format_seconds, in_shell, shorten


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run, or several to lay side by side.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the page to this file; one run's own is RUN/report.html.")
    ] = None,
    md: Annotated[
        Path | None, typer.Option(help="Write Markdown to this file; one run's own is RUN/report.md.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what came out of a run, and write it as a page: losses, figures, answers before and after, data, origin.

    Several runs are laid side by side: their results, the settings that differ, and with --html their curves.
    """
    terminal = Terminal()
    opened = [open_run(run) for run in runs]
    if html is not None or md is not None:
        write_reports(opened, html=html, text=md)
    elif len(opened) == 1 and not as_json:
        gather_facts(opened[0])  # what is damaged is refused
        try:
            write_report(opened[0])
        except RunError as error:  # a run that is read-only is shown, too
            terminal.note(f"no report.html: {error.message}")
    if as_json:
        values = [_as_json(run) for run in opened]
        terminal.json(values[0] if len(values) == 1 else values)
    elif len(opened) == 1:
        _print_one(terminal, opened[0])
    else:
        _print_side_by_side(terminal, opened)
    for path in filter(None, (html, md)):
        terminal.note(f"written: {path}")
    if len(opened) > 1 and html is None:
        terminal.note("their curves in one picture: add --html FILE")


def _as_json(run: RunDir) -> dict[str, Any]:
    manifest = describe_state(run)
    if not run.summary.is_file():
        return asdict(manifest)
    summary = read_summary(run)
    facts = {"run": str(run.path), "status": manifest.status, **asdict(summary)}
    return {**facts, "tokens_per_second": summary.tokens_per_second}


def _print_one(terminal: Terminal, run: RunDir) -> None:
    manifest = describe_state(run)
    has_summary = run.summary.is_file()
    if has_summary:
        print_results(terminal, run, as_json=False)
        print_files(terminal, run)
    if manifest.status != "finished":
        done = f"step {manifest.step}" + (f" of {manifest.total_steps}" if manifest.total_steps else "")
        why = f": {manifest.error}" if manifest.error else ""
        earlier = "; the figures above are of its earlier end" if has_summary else ""
        terminal.plain(f"{run.path}: {manifest.status} at {done}{why}{earlier}")


def _print_side_by_side(terminal: Terminal, runs: Sequence[RunDir]) -> None:
    facts = [gather_facts(run) for run in runs]
    names = [run.name for run in facts]
    terminal.table(("", *names), [(label, *values) for label, values in results_side_by_side(facts)])
    settings = differing_settings(facts)
    if settings:
        terminal.table(("settings that differ", *names), [(name, *values) for name, values in settings], heading="")
    else:
        terminal.plain("\nall have the same recipe")


def print_results(terminal: Terminal, run: RunDir, *, as_json: bool) -> None:
    """Print the summary of a finished run and its answers before and after."""
    summary = read_summary(run)
    if as_json:
        terminal.json(_as_json(run))
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
    terminal.table(("", "before", "after"), _figures(summary), right=(1, 2))
    for question in summary.questions:
        terminal.result(Text(f"\n{_shorten(question.question)}", style="bold"))
        terminal.result(_answer("before", question.before, "red" if question.before != question.expected else "green"))
        terminal.result(_answer("after", question.after, "green" if question.after == question.expected else "red"))
        if question.after != question.expected:
            terminal.result(_answer("expected", question.expected, "dim"))
    print_stored_evaluation(terminal, run)


def print_files(terminal: Terminal, run: RunDir) -> None:
    """Print where everything of a finished run is, its exports with their verdicts, and the next commands."""
    files = [
        *([("report", run.report_page)] if run.report_page.is_file() else []),
        ("adapter", run.adapter),
        ("answers", run.answers),
        ("loss curve", run.loss_curve),
        ("log of the libraries", run.library_log),
    ]
    terminal.table(("file", "where"), files, heading="")
    exports = sorted(path.parent for path in run.exports.glob("*/export.json"))
    if exports:
        from gemma_tune.exporting.export_formats import outcome_of

        print_exports(terminal, outcome_of(exports, None))
    terminal.table(("next", ""), _next_commands(run, is_exported=bool(exports)), heading="")


def _figures(summary: RunSummary) -> list[tuple[str, str | None, str | None]]:
    def written(value: float | None, form: str) -> str | None:
        return None if value is None else format(value, form)

    loss, match = f"eval loss, {summary.eval_rows} rows", f"exact match, {summary.exact_match_rows} rows"
    return [
        (loss, written(summary.eval_loss_before, ".3f"), written(summary.eval_loss_after, ".3f")),
        (match, written(summary.exact_match_before, ".1%"), written(summary.exact_match_after, ".1%")),
    ]


def _answer(label: str, text: str, style: str) -> Text:
    return Text.assemble((f"  {label:<9}", "dim"), (_shorten(text) or "(nothing)", style))


def _shorten(text: str) -> str:
    """Return one line of at most 160 characters."""
    return shorten(" ".join(text.split()), num_chars=160)


def _next_commands(run: RunDir, *, is_exported: bool) -> list[tuple[str, str]]:
    path = in_shell(run.path)
    commands = [("ask it", f'gemma-tune generate {path} --prompt "…"')]
    if read_evaluation(run) is None:
        commands.append(("measure it", f"gemma-tune evaluate {path}"))
    if not is_exported:
        from gemma_tune.runs.lock import read_lock  # here: it knows the recipe, and --help loads no pydantic

        # A base in 4 or 8 bits can be merged into by its 16-bit copy alone, whose place nobody knows.
        is_merged = not (run.lock.is_file() and read_lock(run)["base"].get("quantized"))
        name = "merged-16bit" if is_merged else "adapter"
        commands.append(("export it", f"gemma-tune export {path} --format {name}"))
    return [*commands, ("this again", f"gemma-tune report {path}")]
