"""Every pair of answers before a judge: in which order, what was ruled before, and who wins by it."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.disk import to_json_lines
from gemma_tune.errors import DataError
from gemma_tune.evaluation.comparison import JudgeFacts, Pair, Scores
from gemma_tune.evaluation.intervals import share_estimate
from gemma_tune.evaluation.judge import JUDGE_PROMPT, Duel, Judge, Ruling
from gemma_tune.evaluation.prompt_sets import Prompts
from gemma_tune.identity import text_sha256
from gemma_tune.runs.evaluation import Estimate
from gemma_tune.runs.reporter import Reporter

_SAME_TEXT = "both answers are the same text"
# One showing of a pair: the prompt's id, and the labels in the order in which their answers are shown.
Turn = tuple[str, str, str]


def judge_answers(
    prompts: Prompts, answers: Mapping[str, Sequence[str]], *, judge: Judge, directory: Path, reporter: Reporter
) -> tuple[Scores, JudgeFacts]:
    """Rule on every pair that no stored ruling covers; a judge that ends early leaves the rest unjudged."""
    shown = JUDGE_PROMPT if judge.asks_both_orders else None
    judge_id = judge.name if shown is None else "model-" + text_sha256(f"{judge.name}\n{shown}")[:8]
    file = directory / f"judgments-{judge_id}.jsonl"
    _drop_cut_line(file)
    found = {
        (row["prompt"], row["first"], row["second"]): Ruling(row["verdict"], row["reply"]) for row in read_lines(file)
    }
    turns = list(_turns(prompts, tuple(answers), both_orders=judge.asks_both_orders))
    open_turns = [turn for turn in turns if turn not in found]
    if len(open_turns) < len(turns):
        reporter.detail(f"{len(turns) - len(open_turns):,} of {len(turns):,} duels were judged before")
    place = {prompt.id: index for index, prompt in enumerate(prompts.items)}
    duels = [
        Duel(prompts.items[place[prompt]], answers[first][place[prompt]], answers[second][place[prompt]])
        for prompt, first, second in open_turns
    ]
    with file.open("a", encoding="utf-8", newline="\n") as lines:
        for turn, ruling in _rulings(open_turns, duels, judge):
            found[turn] = ruling
            row = dict(zip(("prompt", "first", "second"), turn, strict=True))
            lines.write(to_json_lines([{**row, "verdict": ruling.verdict, "reply": ruling.reply}]))
            lines.flush()
            if judge.asks_both_orders:  # a person sees the progress in front of each pair
                reporter.progress("duels judged", len(found), len(turns))
    rulings = {turn: found[turn] for turn in turns if turn in found}
    return _scores_of_rulings(rulings, tuple(answers), both_orders=judge.asks_both_orders), JudgeFacts(
        name=judge.name,
        prompt=shown,
        duels=len(rulings),
        expected=len(turns),
        malformed=sum(ruling.verdict == "malformed" for ruling in rulings.values()),
        first_preferred=_first_preferred(rulings.values()),
        consistent=_consistent(rulings) if judge.asks_both_orders else None,
    )


def _turns(prompts: Prompts, labels: Sequence[str], *, both_orders: bool) -> Iterator[Turn]:
    """Every pair on every prompt: in both orders, or in one that a hash draws, the same in every run."""
    for prompt in prompts.items:
        for first, second in itertools.combinations(labels, 2):
            turns = [(prompt.id, first, second), (prompt.id, second, first)]
            if not both_orders:
                turns = [turns[int(text_sha256(repr(turns[0]))[:2], 16) % 2]]
            yield from turns


def _rulings(turns: Sequence[Turn], duels: Sequence[Duel], judge: Judge) -> Iterator[tuple[Turn, Ruling]]:
    """Equal answers are a tie without asking."""
    shown = [*zip(turns, duels, strict=True)]
    yield from ((turn, Ruling("tie", _SAME_TEXT)) for turn, duel in shown if duel.first == duel.second)
    asked = [(turn, duel) for turn, duel in shown if duel.first != duel.second]
    if asked:
        # Not strict: a person may stop.
        for (turn, _), ruling in zip(asked, judge.rule([duel for _, duel in asked]), strict=False):
            if ruling is not None:
                yield turn, ruling


def _drop_cut_line(file: Path) -> None:
    """Drop a last line that a kill has cut."""
    if file.is_file():
        whole = file.read_bytes()
        with file.open("rb+") as lines:
            lines.truncate(whole.rfind(b"\n") + 1)


_POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}


def _scores_of_rulings(rulings: Mapping[Turn, Ruling], labels: Sequence[str], *, both_orders: bool) -> Scores:
    """Of each pair by prompt: the mean over the orders; a pair of which one order has no verdict is left out.

    Half of a pair would bring back the bias for a position that the second order takes away.
    """
    points: dict[Pair, dict[str, list[float]]] = {pair: {} for pair in itertools.combinations(labels, 2)}
    for (prompt, first, second), ruling in rulings.items():
        if ruling.verdict == "malformed":
            continue
        value = _POINTS[ruling.verdict]
        if (first, second) in points:
            points[first, second].setdefault(prompt, []).append(value)
        else:
            points[second, first].setdefault(prompt, []).append(1 - value)
    needed = 2 if both_orders else 1
    return {
        pair: {prompt: sum(values) / needed for prompt, values in of.items() if len(values) == needed}
        for pair, of in points.items()
    }


def _first_preferred(rulings: Iterable[Ruling]) -> Estimate | None:
    clear = [ruling.verdict for ruling in rulings if ruling.verdict in ("first", "second")]
    return share_estimate(clear.count("first") / len(clear), num_rows=len(clear)) if clear else None


def _consistent(rulings: Mapping[Turn, Ruling]) -> Estimate | None:
    same = []
    for (prompt, first, second), ruling in rulings.items():
        other = rulings.get((prompt, second, first))
        # Each pair once, from the side of the label that sorts first.
        if first < second and other is not None and "malformed" not in (ruling.verdict, other.verdict):
            same.append(_POINTS[ruling.verdict] == 1 - _POINTS[other.verdict])
    return share_estimate(sum(same) / len(same), num_rows=len(same)) if same else None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read JSON objects, one a line; none where there is no file."""
    try:
        return [json.loads(line) for line in (file.read_bytes().splitlines() if file.is_file() else [])]
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}", hint="remove it, and the same command makes it again") from None
