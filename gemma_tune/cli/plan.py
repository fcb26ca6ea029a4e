"""`gemma-tune plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.terminal import Terminal
from gemma_tune.text import format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_tune.machine.cards import Card
    from gemma_tune.planning.verdict import Change, Part, Plan
    from gemma_tune.recipe.schema import Recipe

_STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}
# Formulas next to the figures need this much room.
_WIDE = 100
_BAR_WIDTH = 40


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|GB=N",
            help="A card, such as t4, l4, a100-40, h100, rtx-4090, or a memory such as GB=12; without it the card of "
            "this machine, or a table over cards.",
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Cards that train together.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say before anything is downloaded whether a recipe fits on a card, how long it takes, and what would help.

    Exit code 0: it fits; 1: it does not.
    """
    from gemma_tune.engines.choose import decide_for_card
    from gemma_tune.machine.cards import CARDS, TABLE_CARDS, detect_card, find_card
    from gemma_tune.planning.plan import plan_recipe, plan_table
    from gemma_tune.recipe.load import load_recipe

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ())
    card = find_card(gpu) if gpu else detect_card()

    decision = decide_for_card(loaded.recipe, card=card)
    planned = plan_recipe(loaded.recipe, card=card, decision=decision, processes=nproc)
    lengths, rows = plan_table(loaded.recipe, [card] if card else [CARDS[name] for name in TABLE_CARDS])
    if as_json:
        terminal.json(
            {
                **_as_dict(planned),
                "table": [
                    {"card": row_card.name, "tokens": tokens, **_short(cell)}
                    for row_card, cells in rows
                    for tokens, cell in zip(lengths, cells, strict=True)
                ],
            }
        )
    else:
        name = loaded.name if nproc == 1 else f"{loaded.name}, {nproc} cards,"
        _print_plan(terminal, planned, recipe=loaded.recipe, name=name)
        if planned.verdict == "does not fit":
            _print_changes(terminal, planned.changes)
        _print_table(terminal, lengths, rows, recipe=loaded.recipe)
    if planned.verdict == "does not fit":
        raise typer.Exit(1)


def _as_dict(planned: Plan) -> dict[str, Any]:
    return {
        **asdict(planned),
        **_short(planned),
        "resident_bytes": planned.resident_bytes,
        "peak": planned.peak.name,
        "allocated_bytes": planned.allocated_bytes,
        "host_bytes": sum(part.bytes for part in planned.host),
        "disk_bytes": sum(part.bytes for part in planned.disk),
    }


def _short(planned: Plan) -> dict[str, Any]:
    return {
        "verdict": planned.verdict,
        "need_bytes": planned.need_bytes,
        "uncertainty_bytes": planned.uncertainty_bytes,
        "usable_bytes": None if planned.card is None else planned.card.usable_bytes,
    }


def _print_plan(terminal: Terminal, planned: Plan, *, recipe: Recipe, name: str) -> None:
    where = f" on {planned.card.name}" if planned.card else ""
    bits = "NF4" if recipe.model.load_in_4bit else "8 bits" if recipe.model.load_in_8bit else "16 bits"
    tokens = (recipe.training.pack_tokens if recipe.training.packing else None) or recipe.data.max_seq_tokens
    terminal.result(Text(f"{name}{where}", style="bold"))
    terminal.plain(
        f"{planned.model} · {planned.num_params / 1e9:.2f} B in {bits} · rank {recipe.lora.rank}: "
        f"{planned.num_trained / 1e6:.1f} M trained\n"
        f"{planned.engine} · {planned.compute} · {_batch(recipe)} of {tokens:,} tokens · "
        f"checkpointing {recipe.training.gradient_checkpointing}\n"
    )
    terminal.result(_memory_table(planned, wide=terminal.out.width >= _WIDE))
    _print_verdict(terminal, planned)
    _print_rest(terminal, planned)


def _memory_table(planned: Plan, *, wide: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("GPU memory", min_width=26)
    table.add_column("GB", justify="right", min_width=6)
    if wide:
        table.add_column("how it is counted", style="dim", overflow="fold")

    def row(name: str, num_bytes: int, how: str = "", *, style: str = "") -> None:
        cells = [Text(name, style=style), Text(_gb(num_bytes), style=style)]
        table.add_row(*cells, *([Text(how)] if wide else []))

    for part in planned.resident:
        row(part.name, part.bytes, part.how)
    row("always there", planned.resident_bytes, style="bold")
    # Several things come and go; only the largest counts.
    for moment in planned.moments:
        is_peak = moment == planned.peak
        mark = "+ " if is_peak else "  "
        if moment.bytes:
            row(f"{mark}{moment.name}", moment.bytes, moment.how, style="bold" if is_peak else "dim")
    row("+ blocks not filled", planned.margin_bytes, "10 % of the largest moment: an allowance")
    row("+ CUDA context", planned.context_bytes, "an allowance")
    return table


def _print_verdict(terminal: Terminal, planned: Plan) -> None:
    need = f"{_gb(planned.need_bytes)} GB ± {_gb(planned.uncertainty_bytes)}"
    if planned.card is None:
        terminal.result(Text(f"\nneeds {need}; no card was found here, so there is no verdict", style="bold"))
        return
    verdict = planned.verdict or ""
    usable = planned.card.usable_bytes
    filled = min(round(_BAR_WIDTH * planned.need_bytes / usable), _BAR_WIDTH)
    style = _STYLES[verdict]
    text = Text("\n")
    text.append("━" * filled, style=style)
    text.append("━" * (_BAR_WIDTH - filled), style="dim")
    text.append(f"  {verdict}", style=f"bold {style}")
    text.append(f"\nneeds {need} of {_gb(usable)} GB usable on {planned.card.name}\n")
    terminal.result(text)


def _print_rest(terminal: Terminal, planned: Plan) -> None:
    schedule = planned.schedule
    rows = schedule.rows_source
    if schedule.rows is not None and schedule.mean_tokens is not None:
        rows = f"{schedule.rows:,} of about {schedule.mean_tokens:,.0f} tokens ({rows})"
    facts = {
        "time": _time(planned),
        "rows": rows,
        "host memory": _sum(planned.host),
        "disk": _sum(planned.disk),
        "exports, GB": ", ".join(f"{part.name} {_gb(part.bytes, digits=1)}" for part in planned.exports),
    }
    terminal.table(("", ""), [(Text(name, "bold"), fact) for name, fact in facts.items()])


def _time(planned: Plan) -> str:
    from gemma_tune.planning.schedule import TIME_UNCERTAINTY

    schedule = planned.schedule
    steps = "steps not known yet" if schedule.steps is None else f"{schedule.steps:,} steps"
    if schedule.tokens is not None:
        steps += f", {schedule.tokens / 1e6:.1f} M tokens"
    if schedule.seconds is None:
        return f"{steps}; hours are given for a card with a name" if schedule.steps else steps
    low, high = schedule.seconds / TIME_UNCERTAINTY, schedule.seconds * TIME_UNCERTAINTY
    return (
        f"about {_duration(schedule.seconds)} ({_duration(low)} to {_duration(high)}) for {steps}, "
        f"{format_seconds(schedule.seconds_per_step or 0)} a step"
    )


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _print_changes(terminal: Terminal, changes: tuple[Change, ...]) -> None:
    if not changes:
        terminal.result(Text("\nNo setting and no smaller Gemma would make it fit on this card.", style="bold"))
        return
    terminal.result(Text("\nWhat would fit, least costly first:", style="bold"))
    for number, change in enumerate(changes, start=1):
        facts = [f"{_gb(change.need_bytes)} GB", f"{change.slowdown:.2f} times as long"]
        facts += ["tight"] if change.verdict == "tight" else []
        facts += [] if change.learns_the_same else ["trains something else"]
        terminal.result(Text(f"{number}. {', '.join(facts)}"))
        for override in change.overrides:
            terminal.plain(f"   {override}")


def _print_table(
    terminal: Terminal, lengths: tuple[int, ...], rows: list[tuple[Card, list[Plan]]], *, recipe: Recipe
) -> None:
    if not rows:
        return
    table = []
    for card, cells in rows:
        shown = [Text(_gb(cell.need_bytes, digits=1), style=_STYLES[cell.verdict or ""]) for cell in cells]
        for cell, text in zip(cells, shown, strict=True):
            text.append({"fits": " ", "tight": "~", "does not fit": "✗"}[cell.verdict or ""])
        table.append((card.name, _gb(card.usable_bytes, digits=1), *shown))
    columns = ("card", "has", *(f"{tokens:,}" for tokens in lengths))
    heading = f"GB with {_batch(recipe)} of this many tokens"
    terminal.table(columns, table, heading=heading, right=range(1, len(columns)))
    terminal.result(Text("✗ does not fit, ~ may not", style="dim"))


def _batch(recipe: Recipe) -> str:
    unit = "pack" if recipe.training.packing else "row"
    return f"{recipe.training.batch_size} {unit}{'s' if recipe.training.batch_size > 1 else ''}"


def _sum(parts: Sequence[Part]) -> str:
    named = ", ".join(f"{part.name} {_gb(part.bytes, digits=1)}" for part in parts)
    return f"{_gb(sum(part.bytes for part in parts), digits=1)} GB: {named}"


def _gb(num_bytes: int, *, digits: int = 2) -> str:
    return f"{num_bytes / 1e9:.{digits}f}"
