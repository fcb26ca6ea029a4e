"""`gemma-tune compare`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from gemma_tune.cli.answering import note_base
from gemma_tune.cli.arguments import AsJson
from gemma_tune.errors import DataError
from gemma_tune.terminal import Terminal, TerminalReporter

if TYPE_CHECKING:
    from gemma_tune.evaluation.comparison import Comparison
    from gemma_tune.evaluation.judge import Duel, Ruling, Verdict

_PAGE = "comparison.html"
_VERDICTS: dict[str, Verdict] = {"1": "first", "2": "second", "t": "tie"}
_NOTE = (
    "In brackets: 95 % intervals. A win rate counts a tie as half a win; an interval that holds 50 % says that the "
    "prompts do not show which model is better."
)


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C]...",
            help="Runs, adapters, merged directories, GGUF files or model names; RUN@base is the base of a run.",
        ),
    ],
    sets: Annotated[
        str | None,
        typer.Option(
            help="Shipped prompts, separated by commas: factuality, instruction_following, safety, creativity. All of "
            "them unless given."
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", help="Your own prompts: rows with prompt, and if you like id, category, rules, reference."
        ),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="rules (those of the prompts), person (you, blind), the address of an OpenAI-compatible API, or a "
            "local model."
        ),
    ] = "rules",
    judge_model: Annotated[str | None, typer.Option(help="The model to ask behind that address.")] = None,
    judge_timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer of the judge.")] = 120,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N prompts of each set.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory for answers, judgements and page; the same command continues what is there. "
            "comparisons/A-vs-B-PROMPTS unless given.",
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Data template for models that do not say how they are asked.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Compare models on prompts: their answers side by side, who wins, and how sure that is.

    A judge model sees every pair in both orders; its key, if it needs one, comes from GEMMA_TUNE_JUDGE_API_KEY.
    """
    from gemma_tune.evaluation.compare import compare_models, find_contenders
    from gemma_tune.evaluation.judge import JUDGE_PROMPT, find_judge
    from gemma_tune.evaluation.prompt_sets import PROMPT_SETS, load_prompt_file, load_prompt_sets
    from gemma_tune.inference.answer_settings import AnswerSettings
    from gemma_tune.machine.quiet import libraries_to
    from gemma_tune.reporting.pages import write_compare_page

    terminal = Terminal()
    if sets is not None and file is not None:
        raise DataError("give either --sets or --file", hint="--file holds prompts of your own")
    if file is not None:
        prompts = load_prompt_file(file)
    else:
        prompts = load_prompt_sets(PROMPT_SETS if sets is None else [name.strip() for name in sets.split(",")])
    with libraries_to(None):
        contenders = find_contenders(models, default_template=template)
        for target in contenders.values():
            note_base(terminal, target)
        chosen = find_judge(
            judge,
            person=PersonJudge(terminal),
            model=judge_model,
            timeout_seconds=judge_timeout,
            template=template,
            batch_size=batch_size,
        )
        if chosen is not None and chosen.asks_both_orders:
            asked = f"What the judge is asked, with every pair in both orders:\n\n{JUDGE_PROMPT}\n"
            terminal.note(Text(asked, style="dim"))
        directory = output or Path("comparisons") / _name(models, Path(file).stem if file else sets or "all")
        with TerminalReporter(terminal) as reporter:
            comparison = compare_models(
                contenders,
                prompts.first(limit),
                settings=AnswerSettings(max_new_tokens=max_new_tokens, batch_size=batch_size),
                directory=directory,
                judge=chosen,
                reporter=reporter,
            )
    write_compare_page(directory / _PAGE, asdict(comparison))
    if as_json:
        terminal.json(asdict(comparison))
    else:
        print_comparison(terminal, comparison)
    if chosen is not None and comparison.judge.duels < comparison.judge.expected:
        terminal.note("\nthe same command resumes with the pairs that are not judged yet")
    terminal.note(f"\nthe answers side by side: {escape(str(directory / _PAGE))}")


def _name(models: Sequence[str], prompts: str) -> str:
    return "-vs-".join(Path(name).name for name in models) + "-" + prompts.replace(" ", "").replace(",", "+")


class PersonJudge:
    """A person at this terminal, who does not see which model wrote what."""

    name = "person"
    asks_both_orders = False

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def rule(self, duels: Sequence[Duel]) -> Iterator[Ruling | None]:
        """Shows one pair after the other; ends early when the person quits."""
        from gemma_tune.evaluation.judge import Ruling

        for number, duel in enumerate(duels, start=1):
            self._show(duel, number=number, total=len(duels))
            answer = self._ask()
            if answer == "q":
                return
            verdict = _VERDICTS.get(answer)
            yield Ruling(verdict, "") if verdict else None

    def _show(self, duel: Duel, *, number: int, total: int) -> None:
        note = self._terminal.note
        note(Text(f"\n{number} of {total}", style="dim"))
        note(Text(duel.prompt.text, style="bold"))
        if duel.prompt.reference is not None:
            note(Text(f"a right answer: {duel.prompt.reference}", style="dim"))
        for title, text in (("1", duel.first), ("2", duel.second)):
            note(Text(f"\n── answer {title} ──", style="bold blue"))
            note(Text(text or "(nothing)"))

    def _ask(self) -> str:
        """`1`, `2`, `t`, `s` or `q`; the end of stdin is `q`."""
        while True:
            self._terminal.note(Text("\nWhich is better? 1, 2, t(ie), s(kip), q(uit)", style="cyan"))
            line = sys.stdin.readline()
            answer = line.strip().lower()[:1] if line else "q"
            if answer in tuple("12tsq"):
                return answer


def print_comparison(terminal: Terminal, comparison: Comparison) -> None:
    """Rules kept, win rates, scores."""
    from gemma_tune.evaluation.comparison import format_points, format_share

    if comparison.passes:
        groups = list(dict.fromkeys((item.group, item.prompts) for item in comparison.passes))
        kept = {(item.group, item.label): format_share(item.passed) for item in comparison.passes}
        rows = [
            (group or "all", f"{count:,}", *(kept[group, label] for label in comparison.labels))
            for group, count in groups
        ]
        terminal.table(("", "prompts", *comparison.labels), rows, heading="Kept the rules", right=(1,))
    pairs = [
        (
            f"{pair.first} against {pair.second}" if pair.group is None else f"  {pair.group}",
            pair.wins,
            pair.ties,
            pair.losses,
            format_share(pair.win_rate),
        )
        # Each pair with its groups below it.
        for pair in sorted(comparison.pairs, key=lambda pair: _pair_place(comparison, pair.first, pair.second))
    ]
    heading = f"Who wins, judged by {comparison.judge.name}"
    terminal.table(("", "wins", "ties", "losses", "win rate"), pairs, heading=heading, right=(1, 2, 3))
    if comparison.ratings:
        ratings = [(rating.label, format_points(rating.points)) for rating in comparison.ratings]
        terminal.table(("", "points"), ratings, heading="Scores (Bradley-Terry; 400 points are odds of 10 to 1)")
    judge = comparison.judge
    facts = [f"{judge.duels:,} of {judge.expected:,} duels judged"]
    if judge.malformed:
        facts.append(f"{judge.malformed:,} without a readable verdict, whose pairs are left out")
    if judge.first_preferred is not None:
        facts.append(
            f"the answer shown first was preferred in {format_share(judge.first_preferred)} of the clear verdicts"
        )
    if judge.consistent is not None:
        facts.append(f"both orders agree on {format_share(judge.consistent)} of the pairs")
    terminal.result(Text("\n" + "; ".join(facts) + ".\n" + _NOTE, style="dim"))


def _pair_place(comparison: Comparison, first: str, second: str) -> tuple[int, int]:
    return comparison.labels.index(first), comparison.labels.index(second)
