"""Which template reads rows without a recipe, and which of their columns is asked and which answers."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from gemma_tune.data.look.columns import NAMES, WORDS, Column, is_close
from gemma_tune.data.rows.template import load_template
from gemma_tune.errors import DataError
from gemma_tune.recipe.methods import DEFAULT_METHOD, ROW_KINDS, RowKind
from gemma_tune.text import listed

Goal = Literal["chat", "instruct", "complete"]


@dataclass(frozen=True)
class GoalFacts:
    """What a goal means for the rows."""

    about: str  # a line for a question
    templates: tuple[str, ...]  # those that serve it; of the first of them come the fields of rows that fit none
    fields: tuple[str, ...]  # to map other columns to


_PAIR = ("instruction", "response")
GOALS: dict[Goal, GoalFacts] = {
    "chat": GoalFacts(
        "an -it model answers in its own chat turns", ("dolly-chat", "alpaca-chat", "chat", "chat-completion"), _PAIR
    ),
    "instruct": GoalFacts("a base model learns to follow instructions", ("dolly", "alpaca"), _PAIR),
    "complete": GoalFacts("a base model goes on with text", ("text", "completion"), ("text",)),
}
# What rows with a template's own columns are mostly used for, in the order of `template: auto`. Whole text comes last
# of all: a column named text is as often what is asked.
_LIKELY: tuple[tuple[Goal, str], ...] = (
    ("instruct", "dolly"), ("instruct", "alpaca"), ("chat", "chat"),
    ("chat", "chat-completion"), ("complete", "completion"),
)  # fmt: skip


# Columns of preference pairs, the better one first.
_PAIRS = (
    ("chosen", "rejected"), ("preferred", "rejected"), ("accepted", "rejected"), ("preferred", "dispreferred"),
    ("better", "worse"), ("response_j", "response_k"), ("chosen_response", "rejected_response"),
)  # fmt: skip
_MAX_SHOWN = 24
_PROSE = ("text", "constant", "label")
_TWO, _LETTERS = ("true or false", "2 numbers"), ("A", "B", "C", "D", "E")


class Undecided(DataError):
    """No column is clearly the one that is needed; the hint says how to name it."""


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    goal: Goal
    template: str
    columns: Mapping[str, str]  # template field → column, where rows have names of their own
    notes: tuple[str, ...] = ()  # what was chosen where it was a choice, a sentence each
    is_guess: bool = False  # whether a column was taken for what it holds rather than for its name


def recognise(
    label: str, columns: Sequence[Column], *, goal: Goal | None, mapped: Mapping[str, str], command: str
) -> Reading:
    """Decide which template reads the rows, and which column each of its fields is.

    Args:
        label: the source, for messages.
        goal: None where the rows decide it.
        mapped: template field → column, as the user has said.
        command: what the user typed; options that decide are put behind it.

    Raises:
        Undecided: no column is clearly the one that is needed.
        DataError: the rows are for another method, or hold pictures.
    """
    if not mapped:
        _refuse_other_rows(label, columns, command=command)
    has_history = any(column.name == "history" and column.kind != "empty" for column in columns)
    goal = goal or ("complete" if "text" in mapped else "chat" if has_history else None)
    messages = [column.name for column in columns if column.kind == "messages"]
    order = [(goal, name) for name in GOALS[goal].templates] if goal else _LIKELY
    found = next((each for each in order if _fits(each[1], columns, mapped)), None)
    if found:
        return Reading(found[0], *_without_clash(found[1], mapped))
    if len(messages) == 1 and goal in (None, "chat") and not mapped:
        return Reading("chat", "chat", {"messages": messages[0]}, (f"the conversation is the column {messages[0]}",))
    pair = {} if goal == "complete" else _find_pair(columns, mapped)
    if len(pair) == len(_PAIR):
        settled = goal or "instruct"
        chosen, notes = _told(pair, columns, mapped)
        return Reading(settled, *_without_clash(GOALS[settled].templates[0], chosen), notes, is_guess=True)
    is_wanted = goal == "complete"
    whole = _whole_text(columns, wanted=is_wanted) if not mapped and (is_wanted or goal is None) else None
    if whole is not None:
        column = {} if whole.name == "text" else {"text": whole.name}
        note = f"{whole.name} is learned whole, as text that nobody asked for; questions and answers are two columns"
        return Reading("complete", "text", column, (note,), is_guess=bool(column))
    raise _undecided(label, columns, goal=goal, mapped=mapped, pair=pair, command=command)


def _fits(template: str, columns: Sequence[Column], mapped: Mapping[str, str]) -> bool:
    """Whether a template's own fields are there; messages are where it has them, and texts where it has those."""
    facts = load_template(template)
    kinds = {column.name: column.kind for column in columns}
    fields = {**kinds, **{field: kinds.get(name) for field, name in mapped.items()}}
    if facts.conversation:
        return any(fields.get(name) == "messages" for name in facts.conversation) and fields.keys() >= {*facts.required}
    return all(name in fields and fields[name] != "messages" for name in facts.required)


def _without_clash(template: str, columns: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """The template and its columns; where dolly's would read a column named context twice, alpaca's."""
    if not (columns.get("instruction") == "context" and template.startswith("dolly")):
        return template, columns
    mapped = {"instruction": columns["instruction"], "output": columns.get("response", "response")}
    return template.replace("dolly", "alpaca"), mapped


def _whole_text(columns: Sequence[Column], *, wanted: bool) -> Column | None:
    """The column of a corpus: named so, and where that is not what is `wanted`, the only text there is."""
    texts = {column.name.lower(): column for column in columns if column.kind == "text"}
    named = [texts[name] for name in NAMES["whole_text"] if name in texts]
    return named[0] if named and (wanted or "text" in texts or len(texts) == 1) else None


def _find_pair(columns: Sequence[Column], mapped: Mapping[str, str]) -> dict[str, Column]:
    """What is asked and what answers it, as far as they are clear."""
    pair = {field: column for column in columns for field in _PAIR if mapped.get(field) == column.name}
    free = [column for column in columns if column.name not in mapped.values()]
    texts = [column for column in free if column.kind == "text"]
    response = pair.get("response") or _find_response(free, texts)
    asking = [column for column in texts if column is not response and column.can_be_asked]
    asked = pair.get("instruction") or max(
        (column for column in asking if column.is_clearly_asked), key=lambda column: column.asked, default=None
    )
    if asked is None and response is not None and len(asking) == 1:
        asked = asking[0]  # nothing else can be what is asked
    if response is None and asked is not None:
        others = [column for column in texts if column is not asked]
        is_left = len(others) == 1 and asked.asks_strongly and others[0].can_answer
        is_left = is_left and not any(each.kind == "other" and each.is_clearly_answered for each in free)
        response = others[0] if is_left else _find_label(free)
    if asked is not None and response is not None and response.kind != "text" and "instruction" not in pair:
        rivals = [column for column in asking if column is not asked and is_close(asked.asked, column.asked)]
        asked = None if rivals else asked  # a label of two sentences, of which one would not be read
    found = {"instruction": asked, "response": response}
    return {field: column for field, column in found.items() if column is not None}


def _find_response(columns: Sequence[Column], texts: Sequence[Column]) -> Column | None:
    """The best answer: a text that is named so, else a number or one of few values that is."""
    short = [column for column in columns if column.kind in ("number", "label")]
    for candidates in (texts, short):
        named = [column for column in candidates if column.is_clearly_answered]
        if named:
            return max(named, key=lambda column: column.answered)
    return None if len(texts) > 1 else _find_label(columns)


def _find_label(columns: Sequence[Column]) -> Column | None:
    """A column of few values that is named as what a classifier learns."""
    few = [column for column in columns if column.kind in ("label", "number", "text") and column.num_words <= 4]
    return next((column for word in WORDS["label"] for column in few if word in column.words), None)


def _told(
    pair: Mapping[str, Column], columns: Sequence[Column], mapped: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Field → column of a pair and of the context that belongs to it, and what was chosen, in sentences."""
    chosen = {field: column.name for field, column in pair.items()} | dict(mapped)
    for field in ("context", "system"):
        free = [column for column in columns if column.name not in chosen.values() and column.kind in _PROSE]
        named = (column.name for word in NAMES[field] for column in free if column.name.lower() == word)
        if field not in chosen and (name := next(named, None)) is not None:
            chosen[field] = name
    notes = [f"{field} is the column {name} ({_about(columns, name)})" for field, name in chosen.items()]
    for field, score in (("instruction", "asked"), ("response", "answered")):
        for column in columns if field not in mapped and pair[field].kind == "text" else ():
            is_rival = column.kind == "text" and column.name not in chosen.values()
            if is_rival and is_close(getattr(pair[field], score), getattr(column, score)):
                notes.append(f"{column.name} would do about as well: --column {field}={column.name}")
    notes.append("another column: --column instruction=COLUMN, or data.columns.instruction in the recipe")
    return {field: name for field, name in chosen.items() if field != name}, tuple(notes)


def _about(columns: Sequence[Column], name: str) -> str:
    return next((column.about for column in columns if column.name == name), "not in the rows")


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_other_rows(label: str, columns: Sequence[Column], *, command: str) -> None:
    """Refuse rows that another method trains, and those whose text is about a picture."""
    names = {column.name.lower(): column.name for column in columns}
    better = next((names[pair[0]] for pair in _PAIRS if names.keys() >= set(pair)), None)
    answers = [column.name for column in columns if column.kind == "text" and column.is_clearly_answered]
    is_judged = any(column.about in _TWO and column.has_word("judged") for column in columns)
    if better is not None or (is_judged and answers):
        rows: RowKind = "labelled" if better is None else "pair"
        pair = _find_pair(columns, {"response": better or answers[0]})
        known = {field: column.name for field, column in pair.items()}
        way_out = f"to learn one answer of each alone: {command} {_flags(known)}" if len(known) > 1 else None
        raise DataError(
            f"{label} holds {ROW_KINDS[rows]}, which cannot be trained by method {DEFAULT_METHOD}",
            hint=way_out or "write rows with the good answers alone, as instruction and response or as messages",
        )
    roles = next((each.name for each in columns if each.kind == "label" and each.name in ("role", "speaker")), None)
    if roles is not None:
        raise DataError(
            f"{label} holds a message a row, whose {roles} says who speaks, and a conversation is one row",
            hint='group them: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        )
    options = [column.name for column in columns if column.has_word("option") or column.name in _LETTERS]
    if len(options) > 2 or any(column.kind == "other" and column.name in options for column in columns):
        raise DataError(
            f"{label}: what is chosen from ({listed(options)}) stands in columns of its own, which no template reads",
            hint="write the choices into the question, and the chosen one as the answer; or without them: "
            f"{command} --column instruction=COLUMN --column response=COLUMN",
        )
    media = next((column.name for column in columns if column.kind == "media"), None)
    if media is not None:
        raise DataError(
            f"{label}: the column {media} holds pictures or sound, and gemma-tune trains on text alone",
            hint="an answer about a picture that the model does not see is not learned; where rows need none: "
            f"{command} --column instruction=COLUMN --column response=COLUMN",
        )


def _undecided(
    label: str,
    columns: Sequence[Column],
    *,
    goal: Goal | None,
    mapped: Mapping[str, str],
    pair: Mapping[str, Column],
    command: str,
) -> Undecided:
    """Say what each column holds, and the options that decide. `pair`: the fields that are clear."""
    clear = {field: column.name for field, column in pair.items() if field not in mapped}
    fields = [field for field in GOALS[goal or "instruct"].fields if field not in mapped]
    missing = [field for field in fields if field not in clear]
    texts = [column for column in columns if column.kind == "text"]
    shown = columns if len(columns) <= _MAX_SHOWN else texts[:_MAX_SHOWN]
    width = max((len(column.name) for column in shown), default=0)
    told = [f"  {column.name:<{width}}  {column.about}" for column in shown]
    told += [f"  and {len(columns) - len(shown)} more"] if len(columns) > len(shown) else []
    message = "\n".join([f"{label}: no column is clearly the {' or the '.join(missing)}", *told])
    free = [column for column in texts if column.name not in (*mapped.values(), *clear.values())]
    is_exact = len(free) == len(missing) and ("response" not in missing or free[-1].can_answer)
    named = iter([column.name for column in free] if is_exact else ["COLUMN"] * len(missing))
    flags = _flags({field: clear[field] if field in clear else next(named) for field in fields})
    if goal is not None and not mapped:
        with suppress(DataError):
            other = recognise(label, columns, goal=None, mapped={}, command=command).goal
            return Undecided(message, hint=f"they fit --goal {other}; or map them: {flags}")
    if len(free) >= len(missing):
        return Undecided(message, hint=f"say which: {command} {flags}")
    if len(texts) == 1 and goal is None:
        whole = f"{command} --goal complete {_flags({'text': texts[0].name})}"
        what = "answers" if "response" in missing else "questions"
        return Undecided(message, hint=f"add a column of {what}; or learn {texts[0].name} whole, as text: {whole}")
    example = '{"instruction": "…", "response": "…"}'
    return Undecided(message, hint=f"each row needs a question and an answer as text: {example}, or two such columns")


def _flags(columns: Mapping[str, str]) -> str:
    return " ".join(f"--column {shlex.quote(f'{field}={name}')}" for field, name in columns.items())
