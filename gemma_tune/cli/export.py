"""`gemma-tune export`, and how exports and their verdicts are printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from gemma_tune.cli.arguments import AsJson
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.terminal import Terminal, TerminalReporter
from gemma_tune.text import format_bytes

if TYPE_CHECKING:
    from gemma_tune.exporting.export_formats import Exported, ExportOutcome
    from gemma_tune.exporting.export_source import Combination
    from gemma_tune.exporting.merge.combine import CombineMethod
    from gemma_tune.exporting.verify.parity import Distance

SourcePath = Annotated[
    Path, typer.Argument(metavar="RUN|ADAPTER", help="A run that `gemma-tune train` made, or a PEFT adapter.")
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Directory that gets a directory a format; by default RUN/export, or ADAPTER-export next to the adapter.",
    ),
]
MergeDtypeOption = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option("--dtype", help="Precision of merged weights; auto keeps the base's."),
]
MaxShardGb = Annotated[float, typer.Option(min=0.001, help="Largest safetensors file, in 10^9 bytes.")]
BaseName = Annotated[
    str | None, typer.Option("--base", help="Base model of an adapter that names none, or a wrong one.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--skip-verify", help="Run every export and compare it with base + adapter.")
]
Positions = Annotated[
    int | None, typer.Option("--positions", min=8, help="Tokens of eval rows to compare logits at; 200 unless given.")
]


def export(
    source: SourcePath,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="One or several, by commas: adapter, merged-16bit, merged-4bit, ollama, gguf-q8_0, gguf-f16, "
            "gguf-q4_k_m, and other GGUF quantizations, which a wrong name lists.",
        ),
    ],
    output: OutputDir = None,
    dtype: MergeDtypeOption = "auto",
    max_shard_gb: MaxShardGb = 5.0,
    base: BaseName = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Another run or adapter to combine with, into OUTPUT/combined; several times."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weight of each combined adapter, such as 0.7,0.3.")] = None,
    combine: Annotated[
        Literal["linear", "cat", "ties", "dare_linear", "dare_ties"],
        typer.Option(help="How adapters are combined, as PEFT defines it; cat is the exact weighted sum."),
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of values that ties and dare keep.")] = None,
    verify: Verify = True,
    positions: Positions = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained model in one or more formats, and prove each of them. Exit code 1: one did not pass."""
    run_export(
        source,
        formats.split(","),
        ExportSettings.of(dtype=dtype, max_shard_gb=max_shard_gb, verify=verify, num_positions=positions),
        output=output,
        base=base,
        combination=_combination(others or (), weights, method=combine, density=density),
        as_json=as_json,
    )


def _combination(
    others: Sequence[Path], weights: str | None, *, method: CombineMethod, density: float | None
) -> Combination | None:
    from gemma_tune.exporting.export_source import Combination

    if not others and weights is None:
        return None
    try:
        numbers = tuple(float(part) for part in weights.split(",")) if weights else (1.0,) * (len(others) + 1)
    except ValueError:
        raise ExportError(f"--weights {weights}: not numbers", hint="for example --weights 0.7,0.3") from None
    return Combination(tuple(others), numbers, method, density)


def run_export(
    source: Path,
    formats: list[str],
    settings: ExportSettings,
    *,
    output: Path | None,
    base: str | None,
    as_json: bool,
    combination: Combination | None = None,
) -> None:
    """What `export` and `merge` do."""
    from gemma_tune.flows.export import export_model
    from gemma_tune.machine.quiet import libraries_to

    terminal = Terminal()
    with TerminalReporter(terminal) as reporter, libraries_to(None):
        outcome = export_model(
            source, formats, settings=settings, reporter=reporter, output=output, base=base, combination=combination
        )
    print_outcome(terminal, outcome, as_json=as_json)


def print_outcome(terminal: Terminal, outcome: ExportOutcome, *, as_json: bool) -> None:
    """Tables of what was written and how it compares.

    Raises:
        CheckFailed: an export did not pass its check.
    """
    if as_json:
        terminal.json({"exports": [_as_json(each) for each in outcome.exports], "passed": not outcome.failed})
    else:
        _print_figures(terminal, outcome)
        print_exports(terminal, outcome)
    outcome.require_passed()


def _as_json(each: Exported) -> dict[str, Any]:
    record = asdict(each.record)
    return {"path": str(each.path), "num_bytes": each.num_bytes, "kept": each.kept, **record}


def _print_figures(terminal: Terminal, outcome: ExportOutcome) -> None:
    parity = outcome.parity
    if parity is None:
        return
    columns = ("", "verdict", "max", "top-1", "KL", "ppl", "ids", "greedy")
    right = (2, 3, 4, 5, 6, 7)
    rows: list[tuple[str | Text | None, ...]] = []
    if parity.effect is not None:
        rows.append(("base + adapter", None, None, None, None, _figure(parity.reference_perplexity), None, None))
        effect = _distance_cells(parity.effect)
        rows.append(("base alone", None, *effect, _figure(parity.base_perplexity), None, None))
    for result in parity.exports:
        answers = None if result.answers_equal is None else f"{result.answers_equal}/{parity.num_prompts}"
        has_ids = result.distance is not None or result.texts_equal or result.first_difference
        ids = f"{result.texts_equal}/{parity.num_texts}" if has_ids else None
        cells = (*_distance_cells(result.distance), _figure(result.perplexity))
        rows.append((result.name, _verdict(result.passed), *cells, ids, answers))
    terminal.result(f"\ncompared at {parity.num_positions} tokens of {parity.origin}; top-1 leaves near ties out")
    terminal.table(columns, rows, right=right)
    if parity.trained:
        terminal.result("\nagainst the 4-bit model that was trained")
        drift = [(each.name, *_distance_cells(each.distance), _figure(each.perplexity)) for each in parity.trained]
        terminal.table(("", "max", "top-1", "KL", "ppl"), drift, right=(1, 2, 3, 4))
    found = [(each.name, each.expected, each.reason) for each in parity.exports]
    terminal.table(("", "expected", "found"), found, heading="")
    for note in parity.notes:
        terminal.note(Text(f"! {note}"))


def print_exports(terminal: Terminal, outcome: ExportOutcome) -> None:
    """What was written, with its verdict, and what a user must know of it."""
    rows = [
        (each.format, _verdict(each.result.passed if each.result else None), format_bytes(each.num_bytes), each.path)
        for each in outcome.exports
    ]
    terminal.table(("export", "verdict", "size", "where"), rows, heading="", right=(2,))
    for each in outcome.exports:
        for line in _told_facts(each.record.facts):
            terminal.result(Text(f"{each.format}: {line}"))


def _told_facts(facts: Mapping[str, Any]) -> Iterator[str]:
    if "bits_per_weight" in facts:
        yield f"{facts['bits_per_weight']:.2f} bits a weight"
    yield from facts.get("notes", ())
    if "create_command" in facts:
        yield f"run there: {facts['create_command']}"


def _distance_cells(distance: Distance | None) -> tuple[str | None, str | None, str | None]:
    if distance is None:
        return None, None, None
    return f"{distance.max_abs:.1e}", f"{distance.clear_top1:.1%}", f"{distance.mean_kl:.1e}"


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _verdict(passed: bool | None) -> Text:
    if passed is None:
        return Text("unchecked", "yellow")
    return Text("passed", "green") if passed else Text("FAILED", "bold red")
