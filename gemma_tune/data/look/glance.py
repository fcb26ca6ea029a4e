"""A first look at rows without a recipe: what they are for, which template reads them, how long they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma_tune.data.inputs import Inputs, detect_template, open_inputs
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.data.sources.source import open_source, split_count
from gemma_tune.errors import DataError
from gemma_tune.recipe.methods import DEFAULT_METHOD
from gemma_tune.recipe.schema import DataSection

Goal = Literal["chat", "instruct", "complete"]

# Bytes of UTF-8 a token: fewer than the 4.2 of English prose that a plan takes as the mean, because here a row that is
# counted too short would be left out.
BYTES_PER_TOKEN = 3.5
# What a template's own words and control tokens may add to a row.
TEMPLATE_TOKENS = 32
MAX_MEASURED_ROWS = 20_000


@dataclass(frozen=True)
class GoalFacts:
    """What a goal means for the rows."""

    about: str  # a line for a question
    templates: tuple[str, ...]  # those that serve it; of the first of them come the fields of rows that fit none
    fields: Mapping[str, tuple[str, ...]]  # to map other columns to, each with names that such a column often has


_ASKED = ("question", "query", "prompt", "input", "user", "ask", "problem", "title")
_ANSWERED = ("answer", "output", "completion", "reply", "assistant", "solution", "target", "label")
_PAIR = {"instruction": _ASKED, "response": _ANSWERED}
GOALS: dict[Goal, GoalFacts] = {
    "chat": GoalFacts("an -it model answers in its own chat turns", ("dolly-chat", "alpaca-chat", "chat"), _PAIR),
    "instruct": GoalFacts("a base model learns to follow instructions", ("dolly", "alpaca"), _PAIR),
    "complete": GoalFacts(
        "a base model goes on with text", ("text", "completion"), {"text": ("content", "document", "body", "story")}
    ),
}


@dataclass(frozen=True)
class Lengths:
    """How long the rows of a source are."""

    tokens: tuple[int, ...]  # of each row that was measured, sorted; a template's own words are allowed for
    num_rows: int  # of the source; MAX_MEASURED_ROWS where there are more. With `#N` that number


def read_columns(source: str) -> tuple[str, ...]:
    """Read the columns of a source as `data.source` names it; raises a DataError for preference pairs."""
    columns = open_source(split_count(source)[0]).columns
    if {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{source} holds preference pairs (chosen, rejected), which cannot be trained by method {DEFAULT_METHOD}",
            hint=f"look at them with: gemma-tune data audit {source}",
        )
    return columns


def likely_goal(columns: Sequence[str]) -> Goal:
    """What rows with these columns are mostly used for."""
    found = detect_template(columns, prefers_chat=False)
    return next(
        (goal for goal, facts in GOALS.items() if found is not None and found.name in facts.templates), "instruct"
    )


def find_template(columns: Sequence[str], mapped: Mapping[str, str], *, goal: Goal) -> str | None:
    """The shipped template that serves the goal and fits the columns and the fields mapped to them."""
    found = detect_template((*columns, *mapped), prefers_chat=goal == "chat")
    return found.name if found is not None and found.name in GOALS[goal].templates else None


def guess_columns(columns: Sequence[str], *, goal: Goal) -> dict[str, str]:
    """Field → the column that probably holds it; fields for which there is none are left out."""
    guessed: dict[str, str] = {}
    for field, names in GOALS[goal].fields.items():
        column = next((column for name in (field, *names) for column in columns if column.lower() == name), None)
        if column is not None and column not in guessed.values():
            guessed[field] = column
    return guessed


def open_rows(source: str, *, template: str, columns: Mapping[str, str]) -> Inputs:
    """Open rows as a recipe with this template would; raises a DataError for an unknown column or field."""
    section = DataSection(source=source, template=template, columns=dict(columns), max_seq_tokens=8)
    return open_inputs(section, prefers_chat=False)


def measure_rows(inputs: Inputs, *, tokenizer: Path | None) -> Lengths:
    """Lengths of the first MAX_MEASURED_ROWS rows.

    Args:
        tokenizer: a tokenizer.json, where the model's is on this machine; without it bytes are counted.

    Raises:
        DataError: none of them has a text.
    """
    item = inputs.train[0]
    texts, num_rows = [], 0
    for row in itertools.islice(item.source.rows(), MAX_MEASURED_ROWS):
        num_rows += 1
        text = "\n".join(text for _, text in item.texts(row.fields)) if isinstance(row, SourceRow) else ""
        if text:
            texts.append(text)
    if not texts:
        raise DataError(f"{item.source.label}: no row has a text", hint="look at it: its columns hold something else")
    tokens = sorted(length + TEMPLATE_TOKENS for length in _count_tokens(texts, tokenizer))
    return Lengths(tuple(tokens), item.num_rows or num_rows)


def _count_tokens(texts: Sequence[str], tokenizer: Path | None) -> list[int]:
    if tokenizer is None:
        return [round(len(text.encode("utf-8", errors="surrogatepass")) / BYTES_PER_TOKEN) for text in texts]
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))
    return [len(encoding.ids) for encoding in backend.encode_batch_fast(list(texts))]
