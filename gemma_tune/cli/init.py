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

from gemma_tune.errors import DataError, EngineError, GemmaTuneError, ModelError, RecipeError
from gemma_tune.terminal import Terminal, make_table
from gemma_tune.text import format_bytes, format_seconds

if TYPE_CHECKING:
    from gemma_tune.data.inputs import Inputs
    from gemma_tune.data.look.glance import Goal
    from gemma_tune.machine.cards import Card
    from gemma_tune.planning.propose import Proposal

_NO_CARD = "none"
_Answer = TypeVar("_Answer")


def init(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="ROWS",
            help="A .jsonl, .json, .csv, .tsv or .parquet file, a pattern, a hub id owner/name, or tiny-world.",
        ),
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
    from gemma_tune.data.look.glance import open_rows, read_columns
    from gemma_tune.recipe.commented import format_recipe, write_new

    terminal = Terminal()
    asks = not yes and sys.stdin.isatty() and terminal.err.is_terminal
    if output.exists():
        raise RecipeError(f"{output} exists already, and is not overwritten", hint="name another one with --output")
    mapped = _parse_columns(column or ())
    if data is not None:
        source, columns = data, read_columns(data)
    elif asks:
        question = "Your rows: a file, a pattern of files, or a hub dataset owner/name"
        source, columns = _ask(terminal, question, default="tiny-world", read=lambda name: (name, read_columns(name)))
    else:
        raise DataError("init needs rows", hint="name them: gemma-tune init rows.jsonl")
    if not (asks or yes):
        _require_flags(goal=goal, gpu=gpu)
    if asks:
        terminal.note(Text(f"  columns: {', '.join(columns)}", "dim"))
    chosen_goal = goal or _settle_goal(terminal, (*columns, *mapped), model=model, asks=asks)
    _require_kind(model, goal=chosen_goal)
    template, mapped = _settle_template(terminal, source, columns, mapped, goal=chosen_goal, asks=asks, guesses=yes)
    inputs = open_rows(source, template=template, columns=mapped)
    card = _settle_card(terminal, gpu, asks=asks)
    propose = _proposer(source, inputs, template=template, columns=mapped, card=card)
    proposal = _settle_model(terminal, model, goal=chosen_goal, card=card, propose=propose, asks=asks)
    header = _header(proposal, source=source, goal=chosen_goal, output=output)
    text = format_recipe(header, proposal.settings)
    write_new(output, text)
    terminal.plain(text)
    if proposal.plan is not None and proposal.plan.verdict == "tight":
        terminal.note(f"[yellow]![/] {escape(proposal.plan.line)}")
    terminal.note(f"[green]✓[/] wrote {escape(str(output))}; look at the rows, then train:")
    path = shlex.quote(str(output))
    terminal.note(Text(f"  gemma-tune data preview {path}\n  gemma-tune train {path}"))


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


def _settle_goal(terminal: Terminal, columns: Sequence[str], *, model: str | None, asks: bool) -> Goal:
    from gemma_tune.data.look.glance import GOALS, likely_goal

    likely: Goal = "chat" if _is_tuned(model) else likely_goal(columns)
    if not asks:
        return likely
    terminal.err.print(make_table(("goal", ""), [(name, facts.about) for name, facts in GOALS.items()]))
    answer = _ask(terminal, "Goal", default=likely, read=_one_of(list(GOALS)))
    return next(name for name in GOALS if name == answer)


def _is_tuned(model: str | None) -> bool | None:
    """None: not known, or no matter, as the embedded model knows chat turns without having learned them."""
    from gemma_tune.models.catalogue import TINY
    from gemma_tune.models.resolve import resolve_model

    row = None if model is None else resolve_model(model).model
    return None if row is None or row.name == TINY else row.is_instruction_tuned


def _require_kind(model: str | None, *, goal: Goal) -> None:
    is_tuned = _is_tuned(model)
    if goal == "chat" and is_tuned is False:
        raise ModelError(
            f"{model} is a base model and has no chat turns", hint="name an -it model, or use --goal instruct"
        )
    if goal != "chat" and is_tuned:
        raise ModelError(
            f"{model} has learned chat turns, which --goal {goal} would undo", hint="use --goal chat, or a base model"
        )


def _settle_template(
    terminal: Terminal,
    source: str,
    columns: Sequence[str],
    mapped: dict[str, str],
    *,
    goal: Goal,
    asks: bool,
    guesses: bool,
) -> tuple[str, dict[str, str]]:
    """The template, and field → column where rows have names of their own."""
    from gemma_tune.data.look.glance import GOALS, find_template, guess_columns, likely_goal

    template = find_template(columns, mapped, goal=goal)
    if template is not None:
        return template, mapped
    fields = [field for field in GOALS[goal].fields if field not in mapped]
    guessed = guess_columns(columns, goal=goal)
    if asks:
        terminal.note("  No template fits these columns. Which column holds")
        for field in fields:
            unused = [name for name in columns if name not in mapped.values()] or columns
            default = guessed.get(field, unused[0])
            mapped[field] = _ask(terminal, f"  the {field}", default=default, read=_one_of(columns))
    elif guesses and all(field in guessed for field in fields):
        mapped |= {field: guessed[field] for field in fields}
    template = find_template(columns, mapped, goal=goal)
    if template is not None:
        return template, mapped
    flags = " ".join(f"--column {field}={guessed.get(field, 'COLUMN')}" for field in fields)
    hint = f"map them: {flags}"
    other = likely_goal(columns)
    if find_template(columns, {}, goal=other):
        hint = f"they fit --goal {other}; or {hint}"
    raise DataError(f"{source}: its columns ({', '.join(columns)}) fit no template for --goal {goal}", hint=hint)


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


def _proposer(
    source: str, inputs: Inputs, *, template: str, columns: dict[str, str], card: Card | None
) -> Callable[[str], Proposal | None]:
    """What proposes a recipe for a model; rows are measured once for each tokenizer that is here."""
    from gemma_tune.data.look.glance import measure_rows
    from gemma_tune.planning.propose import RowFacts, propose

    @functools.cache
    def facts(tokenizer: Path | None) -> RowFacts:
        lengths = measure_rows(inputs, tokenizer=tokenizer)
        return RowFacts(source, template, columns, lengths.num_rows, lengths.tokens)

    return lambda model: propose(model, facts(_tokenizer_of(model)), card=card)


def _tokenizer_of(model: str) -> Path | None:
    """Its tokenizer.json, where the model is a directory on this machine."""
    from gemma_tune.models.resolve import resolve_model

    path = Path(resolve_model(model).location) / "tokenizer.json"
    return path if path.is_file() else None


def _settle_model(
    terminal: Terminal,
    model: str | None,
    *,
    goal: Goal,
    card: Card | None,
    propose: Callable[[str], Proposal | None],
    asks: bool,
) -> Proposal:
    from gemma_tune.planning.propose import choose_model, models_for

    def read(name: str) -> Proposal:
        _require_kind(name, goal=goal)
        proposal = propose(name)
        if proposal is None:
            assert card is not None
            raise EngineError(
                f"{name} does not fit on {card.name}, not even one row at a time, unless most rows are left out",
                hint="a smaller one is proposed without --model",
            )
        return proposal

    if model is not None:
        return read(model)
    proposals = [found for name in models_for(card, chat=goal == "chat") if (found := propose(name)) is not None]
    if not proposals:
        assert card is not None
        raise EngineError(
            f"no Gemma fits on {card.name} with these rows", hint="--gpu none trains the embedded model on a processor"
        )
    chosen = choose_model(proposals)
    if not asks:
        return chosen
    rows = [(each.model, *_figures(each)) for each in proposals]
    columns = ("model", "download", "needs", "", "time, a guess")
    terminal.err.print(make_table(columns, rows, right=(1, 2, 4)))
    return _ask(terminal, "Model", default=chosen.model, read=read)


def _figures(proposal: Proposal) -> tuple[str | None, ...]:
    """Download, need, verdict and time."""
    plan = proposal.plan
    if plan is None:
        return (None,) * 4
    download = next((part.bytes for part in plan.disk if part.name == "download"), 0)
    seconds = plan.schedule.seconds
    time = None if seconds is None else format_seconds(seconds)
    return format_bytes(download), format_bytes(plan.need_bytes), plan.verdict, time


def _header(proposal: Proposal, *, source: str, goal: Goal, output: Path) -> dict[str, str]:
    """The comments at the top, as shipped recipes have them."""
    from gemma_tune.data.look.glance import GOALS
    from gemma_tune.models.resolve import resolve_model

    plan, command = proposal.plan, f"gemma-tune train {shlex.quote(str(output))}"
    header = {"Goal": f"{GOALS[goal].about}, on the rows of {source}."}
    if plan is None:
        header["Hardware"] = "a processor; nothing was planned for a card."
        expect = "not measured."
    else:
        assert plan.card is not None
        header["Hardware"] = (
            f"{plan.card.name}. Counted: {plan.need_bytes / 1e9:.1f} GB ± {plan.uncertainty_bytes / 1e9:.1f} of the "
            f"{plan.card.usable_bytes / 1e9:.1f} GB it can use."
        )
        seconds = plan.schedule.seconds
        expect = f"{plan.schedule.steps or 0:,} steps" if plan.schedule.steps else "as many steps as there are rows"
        expect += f", about {format_seconds(seconds)}, counted: half or twice that is possible." if seconds else "."
    header |= {"Command": command, "Expect": expect}
    row = resolve_model(proposal.model).model
    if row is not None:
        header["Licence"] = f"{row.licence} for the model."
        if row.is_gated:
            header["Licence"] += f" Accept it at https://huggingface.co/{row.hub_id}, then `hf auth login`."
    return header
