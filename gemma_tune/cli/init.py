"""`gemma-tune init`: a recipe for your rows and your card, from a few questions or flags."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.markup import escape
from rich.prompt import Prompt
from rich.text import Text

from gemma_tune.errors import DataError, GemmaTuneError, RecipeError
from gemma_tune.terminal import Terminal, make_table
from gemma_tune.text import counted, format_bytes, format_seconds, in_shell, shorten, without_controls

if TYPE_CHECKING:
    from gemma_tune.data.look.columns import Column
    from gemma_tune.data.look.glance import RenderedRows
    from gemma_tune.data.look.recognise import Goal, Reading
    from gemma_tune.flows.new_recipe import NewRecipe
    from gemma_tune.machine.cards import Card
    from gemma_tune.planning.propose import Proposal

_NO_CARD = "none"
_SHOWN_LINES, _SHOWN_CHARS = 8, 400  # of a prompt or an answer
_Answer = TypeVar("_Answer")


def init(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="ROWS",
            help="A .jsonl, .json, .csv, .tsv or .parquet file, a pattern, a hub id owner/name, or tiny-world.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[data.FIELD=VALUE]...", help="Settings of the recipe's data section.")
    ] = None,
    goal: Annotated[
        Literal["chat", "instruct", "complete"] | None,
        typer.Option(
            help="chat: an -it model answers in chat turns; instruct: a base model learns to follow instructions; "
            "complete: a base model goes on with text."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|GB=N|none",
            help="The card to train on, as in `gemma-tune plan`; none for a processor. Unless given, this machine's.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model instead of the largest that fits with room to spare.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            help="Where rows have other names: --column instruction=question --column response=answer.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The recipe to write; nothing is ever overwritten.")
    ] = Path("recipe.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take every proposal without asking.")] = False,
) -> None:
    """Write a recipe for your rows, your goal and your card: template, model, length and batch, each with its reason.

    It asks for what is not given; where nobody can be asked, it says what is missing.
    """
    from gemma_tune.data.look.glance import read_columns, render_all
    from gemma_tune.data.look.recognise import recognise
    from gemma_tune.flows.new_recipe import NewRecipe, is_tuned, require_kind
    from gemma_tune.recipe.commented import format_recipe, write_new
    from gemma_tune.recipe.load import read_data_settings

    terminal = Terminal()
    asks = not yes and sys.stdin.isatty() and terminal.err.is_terminal
    if output.exists():
        raise RecipeError(f"{output} exists already, and is not overwritten", hint="name another one with --output")
    mapped, given = _parse_columns(column or ()), read_data_settings(settings or ())
    if data is not None:
        source, columns = data, read_columns(data, given=given)
    elif asks:

        def look(name: str) -> tuple[str, tuple[Column, ...]]:
            return name, read_columns(name, given=given)

        question = "Your rows: a file, a pattern of files, or a hub dataset owner/name"
        source, columns = _ask(terminal, question, default="tiny-world", read=look)
    else:
        raise DataError("init needs rows", hint="name them: gemma-tune init rows.jsonl")
    if not (asks or yes):
        _require_flags(goal=goal, gpu=gpu)
    decide = functools.partial(recognise, source, columns, command=_typed_command())
    likely: Goal | None = "chat" if is_tuned(model) else None
    if asks:
        terminal.err.print(make_table(("column", "holds"), [(each.name, each.about) for each in columns]))
        reading = _ask_reading(terminal, decide, [each.name for each in columns], mapped, goal=goal, likely=likely)
    else:
        reading = decide(goal=goal or likely, mapped=mapped)
    require_kind(model, goal=reading.goal)
    rows = render_all(source, reading, given=given)
    _show_rows(terminal, reading, rows)
    new = NewRecipe(source, reading, rows, _settle_card(terminal, gpu, asks=asks), given)
    proposal = new.require(model) if model is not None else _settle_model(terminal, new, asks=asks)
    text = format_recipe(new.header(proposal, output=output), proposal.settings)
    write_new(output, text)
    terminal.plain(text)
    if proposal.plan is not None and proposal.plan.verdict == "tight":
        _warn(terminal, proposal.plan.line)
    advice = new.advise(proposal, output=output)
    if advice is not None:
        _warn(terminal, advice[0])
        terminal.err.print(Text(f"  {advice[1]}"), soft_wrap=True)  # to be copied in one piece
    terminal.note(f"[green]✓[/] wrote {escape(str(output))}; look at the rows, then train:")
    path = in_shell(output)
    terminal.note(Text(f"  gemma-tune data preview {path}\n  gemma-tune train {path}"))


def _warn(terminal: Terminal, text: str) -> None:
    terminal.note(f"[yellow]![/] {escape(without_controls(text))}")


def _show_rows(terminal: Terminal, reading: Reading, rows: RenderedRows) -> None:
    """What was chosen and found, and the first row as it is trained."""
    for note in reading.notes:
        terminal.note(Text(without_controls(f"  {note}")))
    for note in rows.notes:
        _warn(terminal, note)
    terminal.note(f"{counted(rows.num_rows, 'row')} can be used; {escape(rows.first.where)} as it is trained:")
    shown = [("  prompt", _beginning(rows.first.prompt_text)), ("  learned", _beginning(rows.first.response))]
    terminal.err.print(make_table(("", ""), shown))


def _beginning(text: str) -> str:
    """A few lines of a text."""
    lines = shorten(text.strip(), num_chars=_SHOWN_CHARS).splitlines()
    return "\n".join([*lines[:_SHOWN_LINES], *["…"] * (len(lines) > _SHOWN_LINES)])


def _typed_command() -> str:
    """What the user typed, for a hint that puts options behind it."""
    words = sys.argv[1:]
    return shlex.join(["gemma-tune", *words] if words[:1] == ["init"] else ["gemma-tune", "init", *words])


def _parse_columns(given: Sequence[str]) -> dict[str, str]:
    mapped = {}
    for text in given:
        field, equals, name = text.partition("=")
        if not (field and equals and name):
            raise RecipeError(f"--column {text}: not FIELD=COLUMN", hint="for example --column instruction=question")
        mapped[field] = name
    return mapped


def _require_flags(*, goal: str | None, gpu: str | None) -> None:
    """Refuse to guess silently where nobody can be asked."""
    from gemma_tune.machine.cards import detect_card

    missing = [] if goal else ["--goal chat, instruct or complete"]
    if gpu is None and detect_card() is None:
        missing.append("--gpu with a card such as t4 or GB=12, or none")
    if missing:
        raise RecipeError(
            f"init cannot ask here, as this is no terminal; it needs {' and '.join(missing)}",
            hint="--yes takes every proposal",
        )


def _ask(terminal: Terminal, question: str, *, default: str, read: Callable[[str], _Answer]) -> _Answer:
    """Ask until the answer can be used.

    Raises:
        RecipeError: nobody answers.
    """
    while True:
        try:
            return read(Prompt.ask(escape(question), console=terminal.err, default=default))
        except GemmaTuneError as error:
            terminal.error(error)
        except EOFError:
            raise RecipeError("no answer, so nothing was written", hint="see gemma-tune init --help") from None


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def read(answer: str) -> str:
        if answer not in choices:
            raise RecipeError(f"{answer!r} is none of {', '.join(choices)}")
        return answer

    return read


# --- one decision each ------------------------------------------------------------------------------------------------


def _ask_reading(
    terminal: Terminal,
    decide: Callable[..., Reading],
    names: Sequence[str],
    mapped: dict[str, str],
    *,
    goal: Goal | None,
    likely: Goal | None,
) -> Reading:
    """How the rows are read; what was guessed or is not clear is asked."""
    from gemma_tune.data.look.recognise import GOALS, Undecided

    def attempt(goal: Goal | None) -> Reading | None:
        try:
            return decide(goal=goal, mapped=mapped)
        except Undecided:
            return None

    chosen: Goal = goal or likely or "instruct"
    found = attempt(goal or likely)
    if goal is None:
        terminal.err.print(make_table(("goal", ""), [(name, facts.about) for name, facts in GOALS.items()]))
        default = likely or (found.goal if found else chosen)
        answer = _ask(terminal, "Goal", default=default, read=_one_of(list(GOALS)))
        chosen = next(name for name in GOALS if name == answer)
        found = attempt(chosen)
    if found is not None and not found.is_guess:
        return found
    terminal.note("  Which column holds")
    for field in (field for field in GOALS[chosen].fields if field not in mapped):
        unused = [name for name in names if name not in mapped.values()] or names
        guess = found.columns.get(field, field) if found else field
        guess = guess if guess in names else unused[0]
        mapped[field] = _ask(terminal, f"  the {field}", default=guess, read=_one_of(names))
    context = found.columns.get("context") if found else None
    if context is not None and context not in mapped.values():
        mapped["context"] = context
    return decide(goal=chosen, mapped=mapped)


def _settle_card(terminal: Terminal, gpu: str | None, *, asks: bool) -> Card | None:
    from gemma_tune.machine.cards import detect_card, find_card

    def read(answer: str) -> Card | None:
        return None if answer.lower() == _NO_CARD else find_card(answer)

    if gpu is not None:
        return read(gpu)
    detected = detect_card()
    if not asks:
        return detected
    default = _NO_CARD if detected is None else detected.name
    question = "Card: a name such as t4, l4, rtx-4090, a memory such as GB=12, or none"
    return _ask(
        terminal,
        question,
        default=default,
        read=lambda answer: detected if answer == default and detected is not None else read(answer),
    )


def _settle_model(terminal: Terminal, new: NewRecipe, *, asks: bool) -> Proposal:
    from gemma_tune.planning.propose import choose_model

    proposals = new.all()
    chosen = choose_model(proposals)
    if not asks:
        return chosen
    rows = [(each.model, *_figures(each)) for each in proposals]
    columns = ("model", "download", "needs", "", "time, a guess")
    terminal.err.print(make_table(columns, rows, right=(1, 2, 4)))
    return _ask(terminal, "Model", default=chosen.model, read=new.require)


def _figures(proposal: Proposal) -> tuple[str | None, ...]:
    """Download, need, verdict and time."""
    plan = proposal.plan
    if plan is None:
        return (None,) * 4
    download = next((part.bytes for part in plan.disk if part.name == "download"), 0)
    seconds = plan.schedule.seconds
    time = None if seconds is None else format_seconds(seconds)
    return format_bytes(download), format_bytes(plan.need_bytes), plan.verdict, time
