"""`gemma-tune benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gemma_tune.cli.answering import TargetName, note_base
from gemma_tune.cli.arguments import AsJson
from gemma_tune.errors import DataError
from gemma_tune.evaluation.benchmark_table import BENCHMARKS, PAPER_SET, PUBLISHED_MODELS, PUBLISHED_SOURCE
from gemma_tune.terminal import Terminal, TerminalReporter

if TYPE_CHECKING:
    from gemma_tune.evaluation.benchmarks import BenchmarkResult

_COLUMNS = {"base": "base", "tuned": "tuned", "model": "this model"}
_NOTE = (
    "In percent; in brackets: 95 % intervals (Wilson) over the questions asked. The published figures were measured "
    "with other prompts and programs, so a difference of a few points says nothing; base and tuned are measured "
    "alike.\n"
    f"published: {PUBLISHED_SOURCE}"
)


def benchmark(
    target: TargetName,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "-t",
            help=f"Separated by commas: {', '.join(BENCHMARKS)}; {PAPER_SET} for all of them; a file of --task-dir; "
            "any task of the harness.",
        ),
    ] = PAPER_SET,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N questions of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in front of each question; the report's, else the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward pass.")] = 8,
    task_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory with tasks of your own: .jsonl rows of question, choices and answer, or .yaml of the "
            "harness. A file named as a benchmark stands for it."
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Let tasks execute code: programs that the model writes, .yaml of --task-dir."
        ),
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what is stored in the run already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on public benchmarks with lm-evaluation-harness, next to the published figures.

    A run or an adapter is measured with its base. A run keeps its results, and makes again only what has changed.
    """
    from gemma_tune.evaluation.benchmark_tasks import BenchmarkSettings, choose_tasks, require_harness
    from gemma_tune.evaluation.benchmarks import run_benchmarks
    from gemma_tune.inference.target import find_target
    from gemma_tune.machine.quiet import libraries_to
    from gemma_tune.runs.layout import open_run

    terminal = Terminal()
    require_harness()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise DataError("nothing to measure", hint=f"--tasks mmlu,hellaswag or --tasks {PAPER_SET}")
    settings = BenchmarkSettings(
        shots=shots, limit=limit, batch_size=batch_size, task_dir=task_dir, allow_code=allow_code
    )
    # The harness asks no model with a data template, so one that has none is as good.
    found = find_target(target, default_template="completion")
    note_base(terminal, found)
    run = open_run(Path(target)) if (Path(target) / "manifest.json").is_file() else None
    with libraries_to(run.library_log if run else None), TerminalReporter(terminal) as reporter:
        chosen, left_out = choose_tasks(names, settings=settings)
        if left_out:
            reporter.warn(f"left out, as they execute code: {', '.join(left_out)} (--allow-code runs them)")
        results = run_benchmarks(found, chosen, settings=settings, run=run, reporter=reporter, again=again)
    if as_json:
        terminal.json([{**asdict(result), "published": _published_json(result)} for result in results])
    else:
        print_benchmarks(terminal, results)


def _published_json(result: BenchmarkResult) -> dict[str, object] | None:
    if result.published is None:
        return None
    return {**dict(zip(PUBLISHED_MODELS, result.published, strict=True)), "source": PUBLISHED_SOURCE}


def print_benchmarks(terminal: Terminal, results: Sequence[BenchmarkResult]) -> None:
    """A line a task: the sides that were measured, and the published figures."""
    sides = list(dict.fromkeys(result.side for result in results))
    by_task: dict[str, dict[str, BenchmarkResult]] = {}
    for result in results:
        by_task.setdefault(result.name, {})[result.side] = result
    rows = []
    for of_task in by_task.values():
        some = next(iter(of_task.values()))
        published = some.published or (None,) * len(PUBLISHED_MODELS)
        rows.append(
            (
                some.label,
                f"{some.questions:,}",
                some.shots,
                some.metric,
                *(_figure(of_task[side]) for side in sides),
                *(None if value is None else f"{value:.1f}" for value in published),
            )
        )
    columns = ("", "questions", "shots", "measure", *(_COLUMNS[side] for side in sides), *PUBLISHED_MODELS)
    num_columns = len(columns)
    right = (1, 2, *range(num_columns - len(PUBLISHED_MODELS), num_columns))
    terminal.table(columns, rows, heading="", right=right)
    terminal.result(Text(f"\n{_NOTE}", style="dim"))


def _figure(result: BenchmarkResult) -> str:
    is_share = result.value.low is not None
    return result.value.format(lambda value: f"{value * 100:.1f}" if is_share else f"{value:,.3f}")
