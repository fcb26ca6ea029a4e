"""What the columns of rows hold, by their values first and their names second: which is asked, which answers."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from gemma_tune.data.rows.template import load_template
from gemma_tune.errors import DataError
from gemma_tune.recipe.methods import DEFAULT_METHOD, ROW_KINDS, RowKind
from gemma_tune.text import counted, listed

Goal = Literal["chat", "instruct", "complete"]
Kind = Literal["text", "label", "number", "id", "constant", "empty", "form", "messages", "media", "other"]


@dataclass(frozen=True)
class GoalFacts:
    """What a goal means for the rows."""

    about: str  # a line for a question
    templates: tuple[str, ...]  # those that serve it; of the first of them come the fields of rows that fit none
    fields: tuple[str, ...]  # to map other columns to


_PAIR = ("instruction", "response")
GOALS: dict[Goal, GoalFacts] = {
    "chat": GoalFacts("an -it model answers in its own chat turns", ("dolly-chat", "alpaca-chat", "chat"), _PAIR),
    "instruct": GoalFacts("a base model learns to follow instructions", ("dolly", "alpaca"), _PAIR),
    "complete": GoalFacts("a base model goes on with text", ("text", "completion"), ("text",)),
}
# What rows with a template's own columns are mostly used for, in the order of `template: auto`. Whole text comes last
# of all: a column named text is as often what is asked.
_LIKELY: tuple[tuple[Goal, str], ...] = (
    ("instruct", "dolly"), ("instruct", "alpaca"), ("chat", "chat"), ("complete", "completion"),
)  # fmt: skip


def _weights(*lines: tuple[float, str]) -> Mapping[str, float]:
    return {word: weight for weight, words in lines for word in words.split()}


# How far a word in a column's name speaks for what it holds.
_ASKED = _weights(
    (3, "question query prompt instruction frage pregunta domanda vraag pytanie"),
    (2, "input request problem human ask task utterance issue inquiry complaint term"),
    (1.5, "user customer client body message"),
    (1, "text content description review comment sentence source article document passage ticket post email tweet"),
    (0.5, "title subject headline"),
)
_ANSWERED = _weights(
    (3, "answer response completion output reply antwort respuesta risposta antwoord reponse réponse"),
    (2, "assistant bot gpt solution resolution target summary translation correction rewrite generation highlight"),
    (1.5, "agent support expected gold reference"),
    (1, "definition explanation meaning code"),
)
_LABELS = ["label", "sentiment", "intent", "category", "class", "emotion", "topic", "polarity", "rating", "star"]
_CONTEXT = ["context", "input", "passage", "knowledge", "background"]
_ID_WORDS = {"id", "uuid", "guid", "key", "index", "idx", "hash", "sha", "nr", "no"}
_WHOLE_TEXTS = ["text", "content", "document", "body", "story", "article", "passage"]
_CLEAR, _CLOSE = 0.3, 0.5  # share of questions that makes a column one of questions; scores that are about equal

_NUMBER = re.compile(r"[-+]?[\d.,_]*\d[\d.,_]*(e[-+]?\d+)?\s?%?", re.IGNORECASE)
_FORMS: Mapping[str, re.Pattern[str]] = {
    "dates": re.compile(
        r"\d{4}([-/.])\d\d?\1\d\d?([T ].*)?|\d\d?([-/.])\d\d?\3(\d{4}|\d\d)(,? .*)?|\d\d?:\d\d(:\d\d)?"
    ),
    "web addresses": re.compile(r"(https?://|www\.)\S+", re.IGNORECASE),
    "e-mail addresses": re.compile(r"\S+@\S+\.\w+"),
}
_MEDIA_FILE = re.compile(r"[^\n]+\.(png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|mp4|flac|ogg|webm)", re.IGNORECASE)
_MEDIA_NAMES = (["image"], ["img"], ["picture"], ["photo"], ["audio"], ["video"])
_CODE = re.compile(r"(?=.*[\d_#/:-])[!-~]+")  # one word of ASCII with a digit or a joint in it
_NEARLY_ALL = 0.95
# Whether an answer is a good one.
_TWO, _JUDGED = ("true or false", "2 numbers"), {"label", "correct", "good", "accepted", "helpful"}

# What a question offers to choose from.
_OPTIONS, _LETTERS = {"choice", "option", "distractor"}, ("A", "B", "C", "D", "E")
# Columns that other training methods take, by the kind of their rows.
_PAIRS = (
    ("chosen", "rejected"), ("preferred", "rejected"), ("accepted", "rejected"), ("preferred", "dispreferred"),
    ("better", "worse"), ("response_j", "response_k"), ("chosen_response", "rejected_response"),
)  # fmt: skip


class Undecided(DataError):
    """No column is clearly the one that is needed; the hint says how to name it."""


@dataclass(frozen=True)
class Column:
    """What the first rows show of one column."""

    name: str
    kind: Kind
    about: str  # for a person: `text of 23 words`, `4 values`
    num_words: float = 0  # mean of its texts
    questions: float = 0  # share of its texts that end in a question mark
    filled: float = 1  # share of the rows that have it

    @property
    def asked(self) -> float:
        """How far it looks like what is asked."""
        return _score(self.name, _ASKED, _ANSWERED) + 2 * self.questions + min(self.num_words, 30) / 30 + self.filled

    @property
    def answered(self) -> float:
        """How far it looks like what is answered."""
        return _score(self.name, _ANSWERED, _ASKED) - 2 * self.questions + min(self.num_words, 30) / 30 + self.filled

    @property
    def is_clearly_asked(self) -> bool:
        return self.questions >= _CLEAR or _score(self.name, _ASKED, _ANSWERED) > 0

    @property
    def asks_strongly(self) -> bool:
        return self.questions >= _CLEAR or _score(self.name, _ASKED, _ANSWERED) >= 2

    @property
    def can_answer(self) -> bool:
        """Whether it is not clearly something else."""
        return not self.is_clearly_asked and self.name.lower() not in _CONTEXT

    @property
    def can_be_asked(self) -> bool:
        """Whether it is more than a name or a code."""
        return self.num_words >= 3 or self.asks_strongly

    @property
    def is_clearly_answered(self) -> bool:
        return _score(self.name, _ANSWERED, _ASKED) > 0


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    goal: Goal
    template: str
    columns: Mapping[str, str]  # template field → column, where rows have names of their own
    notes: tuple[str, ...] = ()  # what was chosen where it was a choice, a sentence each
    is_guess: bool = False  # whether a column was taken for what it holds rather than for its name


def describe_columns(rows: Sequence[Mapping[str, object]]) -> tuple[Column, ...]:
    """Say of every column of the rows what it holds."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(_describe(name, [row.get(name) for row in rows]) for name in names)


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
    goal = goal or ("complete" if "text" in mapped else None)
    messages = [column.name for column in columns if column.kind == "messages"]
    usable = {column.name for column in columns} - ({"messages", "conversations"} - set(messages))
    order = [(goal, name) for name in GOALS[goal].templates] if goal else _LIKELY
    found = next((each for each in order if _fits(each[1], usable | mapped.keys())), None)
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


def _fits(template: str, names: set[str]) -> bool:
    facts = load_template(template)
    return names.issuperset(facts.required) and (not facts.conversation or not names.isdisjoint(facts.conversation))


def _without_clash(template: str, columns: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """The template and its columns; where dolly's would read a column named context twice, alpaca's."""
    if not (columns.get("instruction") == "context" and template.startswith("dolly")):
        return template, columns
    mapped = {"instruction": columns["instruction"], "output": columns.get("response", "response")}
    return template.replace("dolly", "alpaca"), mapped


def _whole_text(columns: Sequence[Column], *, wanted: bool) -> Column | None:
    """The column of a corpus: named so, and where that is not what is `wanted`, the only text there is."""
    texts = {column.name.lower(): column for column in columns if column.kind == "text"}
    named = [texts[name] for name in _WHOLE_TEXTS if name in texts]
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
        rivals = [column for column in asking if column is not asked and _is_close(asked.asked, column.asked)]
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
    return next((column for word in _LABELS for column in few if word in _words(column.name)), None)


def _told(
    pair: Mapping[str, Column], columns: Sequence[Column], mapped: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Field → column of a pair and of the context that belongs to it, and what was chosen, in sentences."""
    chosen = {field: column.name for field, column in pair.items()} | dict(mapped)
    context = next(
        (
            column.name
            for word in _CONTEXT
            for column in columns
            if column.kind == "text" and word == column.name.lower() and column.name not in chosen.values()
        ),
        None,
    )
    if context is not None and "context" not in chosen:
        chosen["context"] = context
    notes = [f"{field} is the column {name} ({_about(columns, name)})" for field, name in chosen.items()]
    for field, score in (("instruction", "asked"), ("response", "answered")):
        for column in columns if field not in mapped and pair[field].kind == "text" else ():
            is_close = _is_close(getattr(pair[field], score), getattr(column, score))
            if is_close and column.kind == "text" and column.name not in chosen.values():
                notes.append(f"{column.name} would do about as well: --column {field}={column.name}")
    notes.append("another column: --column instruction=COLUMN, or data.columns.instruction in the recipe")
    unread = [column.name for column in columns if column.name not in chosen.values() and column.kind != "empty"]
    if unread:
        notes.append(f"not read: {listed(unread, shown=8)}")
    return {field: name for field, name in chosen.items() if field != name}, tuple(notes)


def _is_close(best: float, other: float) -> bool:
    return best - other < _CLOSE


def _about(columns: Sequence[Column], name: str) -> str:
    return next((column.about for column in columns if column.name == name), "not in the rows")


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_other_rows(label: str, columns: Sequence[Column], *, command: str) -> None:
    """Refuse rows that another method trains, and those whose text is about a picture."""
    names = {column.name.lower(): column.name for column in columns}
    better = next((names[pair[0]] for pair in _PAIRS if names.keys() >= set(pair)), None)
    answers = [column.name for column in columns if column.kind == "text" and column.is_clearly_answered]
    is_judged = any(column.about in _TWO and _JUDGED & set(_words(column.name)) for column in columns)
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
    options = [column.name for column in columns if _OPTIONS & set(_words(column.name)) or column.name in _LETTERS]
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
    width = max(len(column.name) for column in columns)
    message = f"{label}: no column is clearly the {' or the '.join(missing)}\n" + "\n".join(
        f"  {column.name:<{width}}  {column.about}" for column in columns
    )
    texts = [column for column in columns if column.kind == "text"]
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
        return Undecided(message, hint=f"add a column of answers; or learn {texts[0].name} whole, as text: {whole}")
    example = '{"instruction": "…", "response": "…"}'
    return Undecided(message, hint=f"each row needs a question and an answer as text: {example}, or two such columns")


def _flags(columns: Mapping[str, str]) -> str:
    return " ".join(f"--column {shlex.quote(f'{field}={name}')}" for field, name in columns.items())


# --- one column -------------------------------------------------------------------------------------------------------


def _words(name: str) -> list[str]:
    """The words of a column's name, in lower case and without a plural s."""
    parted = re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name))
    return [word.lower().removesuffix("s") if len(word) > 3 else word.lower() for word in parted]


def _score(name: str, speaks_for: Mapping[str, float], against: Mapping[str, float]) -> float:
    words = _words(name)
    return sum(speaks_for.get(word, 0) for word in words) - sum(against.get(word, 0) for word in words)


def _num_words(text: str) -> float:
    """Words between spaces; two characters of a script that has none count as one."""
    return len(text.split()) + sum(char >= "\u2e80" for char in text) / 2


def _describe(name: str, values: Sequence[object]) -> Column:
    given = [value for value in values if value == value and value is not None and value != "" and value != []]
    filled = len(given) / len(values)
    if not given or all(isinstance(value, str) and not value.strip() for value in given):
        return Column(name, "empty", "empty", filled=0)
    if all(isinstance(value, bool) or str(value).lower() in ("true", "false") for value in given):
        return Column(name, "label", "true or false", 1, filled=filled)
    if all(isinstance(value, int | float) for value in given):
        is_few = len(set(given)) * 2 <= len(given)
        kind: Kind = "id" if _ID_WORDS & set(_words(name)) else "label" if is_few else "number"
        return Column(name, kind, f"{len(set(given))} numbers" if is_few else "numbers", 1, filled=filled)
    if all(isinstance(value, datetime.date | datetime.time | datetime.timedelta) for value in given):
        return Column(name, "form", "dates", filled=filled)
    if not all(isinstance(value, str) for value in given):
        return _describe_nested(name, given, filled=filled)
    return _describe_texts(name, [value.strip() for value in given if isinstance(value, str)], filled=filled)


def _describe_nested(name: str, given: Sequence[object], *, filled: float) -> Column:
    items = [item for value in given for item in (value if isinstance(value, list) else [value])]
    if any(isinstance(item, bytes) or (isinstance(item, Mapping) and "bytes" in item) for item in items):
        return Column(name, "media", "pictures or sound", filled=filled)
    if all(isinstance(value, list) for value in given):
        if all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items):
            return Column(name, "messages", "messages", filled=filled)
        if items and all(isinstance(item, str) and _MEDIA_FILE.fullmatch(item) for item in items):
            return Column(name, "media", "pictures or sound", filled=filled)
        return Column(name, "other", "lists", filled=filled)
    keys = list(dict.fromkeys(key for item in items if isinstance(item, Mapping) for key in item))
    return Column(name, "other", f"objects ({listed(keys)})" if keys else "values of several kinds", filled=filled)


def _describe_texts(name: str, texts: Sequence[str], *, filled: float) -> Column:
    def nearly_all(pattern: re.Pattern[str]) -> bool:
        return sum(pattern.fullmatch(text) is not None for text in texts) >= _NEARLY_ALL * len(texts)

    distinct, words = len(set(texts)), statistics.fmean(map(_num_words, texts))
    form = next((form for form, pattern in _FORMS.items() if nearly_all(pattern)), None)
    # A picture's address next to a text is mostly an ornament.
    if nearly_all(_MEDIA_FILE) and (form is None or _words(name) in _MEDIA_NAMES):
        return Column(name, "media", "pictures or sound", filled=filled)
    if all(_is_messages(text) for text in texts):
        return Column(name, "messages", "messages as JSON text", filled=filled)
    if form is not None:
        return Column(name, "form", form, filled=filled)
    is_code = nearly_all(_CODE) and distinct >= _NEARLY_ALL * len(texts)
    is_named_id = bool(_ID_WORDS & set(_words(name))) and words < 1.5
    if is_named_id or (is_code and not nearly_all(_NUMBER) and len(texts) > 1):
        return Column(name, "id", "ids", filled=filled)
    if distinct == 1 and len(texts) > 1:
        return Column(name, "constant", "the same in every row", words, filled=filled)
    if distinct * 2 <= len(texts) and words <= 4:
        return Column(name, "label", counted(distinct, "value"), words, filled=filled)
    if nearly_all(_NUMBER):
        return Column(name, "number", "numbers", words, filled=filled)
    questions = sum(text.endswith(("?", "？", "؟")) for text in texts) / len(texts)
    about = f"text of about {counted(max(1, round(words)), 'word')}" + (", questions" if questions >= _CLEAR else "")
    return Column(name, "text", about, words, questions, filled)


def _is_messages(text: str) -> bool:
    if not text.startswith("["):
        return False
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(items) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)
