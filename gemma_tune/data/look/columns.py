"""What the columns of rows hold, by the values of the first rows and by the words in their names."""

import datetime
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_tune.data.sources.cells import ROLE_KEYS
from gemma_tune.paths import read_table
from gemma_tune.text import counted, listed

Kind = Literal["text", "label", "number", "id", "constant", "empty", "form", "messages", "media", "other"]

_TABLE = read_table("data/look/column_names.toml")
NAMES: Mapping[str, list[str]] = {key: text.split() for key, text in _TABLE["names"].items()}
WORDS: Mapping[str, list[str]] = {key: text.split() for key, text in _TABLE["words"].items()}
_ASKED, _ANSWERED = (
    {word: float(weight) for weight, words in _TABLE[key].items() for word in words.split()}
    for key in ("asked", "answered")
)
# The share of questions that makes a column one of questions; scores that are about equal; nearly all values.
_CLEAR, _CLOSE, _NEARLY_ALL = 0.3, 0.5, 0.95

_NUMBER = re.compile(r"[-+]?[\d.,_]*\d[\d.,_]*(e[-+]?\d+)?\s?%?", re.IGNORECASE)
_FORMS: Mapping[str, re.Pattern[str]] = {
    "dates": re.compile(
        r"\d{4}([-/.])\d\d?\1\d\d?([T ].*)?|\d\d?([-/.])\d\d?\3(\d{4}|\d\d)(,? .*)?|\d\d?:\d\d(:\d\d)?"
    ),
    "web addresses": re.compile(r"(https?://|www\.)\S+", re.IGNORECASE),
    "e-mail addresses": re.compile(r"\S+@\S+\.\w+"),
}
_MEDIA_FILE = re.compile(r"[^\n]+\.(png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|mp4|flac|ogg|webm)", re.IGNORECASE)
_CODE = re.compile(r"(?=.*[\d_#/:-])[!-~]+")  # one word of ASCII with a digit or a joint in it


@dataclass(frozen=True)
class Column:
    """What the first rows show of one column."""

    name: str
    kind: Kind
    about: str  # for a person: `text of about 23 words`, `4 values`
    num_words: float = 0  # mean of its texts
    questions: float = 0  # share of its texts that end in a question mark
    filled: float = 1  # share of the rows that have it

    @property
    def leaning(self) -> float:
        """How far the words of its name speak for what is asked, and below 0 for what is answered."""
        return sum(_ASKED.get(word, 0) - _ANSWERED.get(word, 0) for word in self.words)

    @property
    def asked(self) -> float:
        """How far it looks like what is asked."""
        return self.leaning + 2 * self.questions + min(self.num_words, 30) / 30 + self.filled

    @property
    def answered(self) -> float:
        """How far it looks like what is answered."""
        return -self.leaning - 2 * self.questions + min(self.num_words, 30) / 30 + self.filled

    @property
    def is_clearly_asked(self) -> bool:
        return self.questions >= _CLEAR or self.leaning > 0

    @property
    def asks_strongly(self) -> bool:
        return self.questions >= _CLEAR or self.leaning >= 2

    @property
    def can_be_asked(self) -> bool:
        """Whether it is more than a name or a code."""
        return self.num_words >= 3 or self.asks_strongly

    @property
    def is_clearly_answered(self) -> bool:
        return self.leaning < 0

    @property
    def can_answer(self) -> bool:
        """Whether it is not clearly something else."""
        return not self.is_clearly_asked and self.name.lower() not in NAMES["context"]

    @property
    def words(self) -> list[str]:
        """The words of its name, in lower case and without a plural s."""
        parted = re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", self.name))
        return [word.lower().removesuffix("s") if len(word) > 3 else word.lower() for word in parted]

    def has_word(self, group: str) -> bool:
        """Whether its name has a word of a group of WORDS."""
        return not set(self.words).isdisjoint(WORDS[group])


def describe_columns(rows: Sequence[Mapping[str, object]]) -> tuple[Column, ...]:
    """Say of every column of the rows what it holds."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(_describe(name, [row.get(name) for row in rows]) for name in names)


def _num_words(text: str) -> float:
    """Words between spaces; two characters of a script that has none count as one."""
    return len(text.split()) + sum(char >= "\u2e80" for char in text) / 2


def is_close(best: float, other: float) -> bool:
    """Whether one score is about as good as the best."""
    return best - other < _CLOSE


def _describe(name: str, values: Sequence[object]) -> Column:
    given = [value for value in values if value == value and value is not None and value != "" and value != []]
    filled = len(given) / len(values)
    if not given or all(isinstance(value, str) and not value.strip() for value in given):
        return Column(name, "empty", "empty", filled=0)
    if all(isinstance(value, bool) or str(value).lower() in ("true", "false") for value in given):
        return Column(name, "label", "true or false", 1, filled=filled)
    if all(isinstance(value, int | float) for value in given):
        is_few = len(set(given)) * 2 <= len(given)
        about = f"{len(set(given))} numbers" if is_few else "numbers"
        column = Column(name, "label" if is_few else "number", about, 1, filled=filled)
        return replace(column, kind="id", about="ids") if column.has_word("id") else column
    if all(isinstance(value, datetime.date | datetime.time | datetime.timedelta) for value in given):
        return Column(name, "form", "dates", filled=filled)
    if not all(isinstance(value, str) for value in given):
        return _describe_nested(name, given, filled=filled)
    return _describe_texts(name, [value.strip() for value in given if isinstance(value, str)], filled=filled)


def _describe_nested(name: str, given: Sequence[object], *, filled: float) -> Column:
    items: list[Any] = [item for value in given for item in (value if isinstance(value, list) else [value])]
    if any(isinstance(item, bytes) or (isinstance(item, Mapping) and "bytes" in item) for item in items):
        return Column(name, "media", "pictures or sound", filled=filled)
    if all(isinstance(value, list) for value in given):
        if all(map(_is_message, items)):
            return Column(name, "messages", "messages", filled=filled)
        if items and all(isinstance(item, str) and _MEDIA_FILE.fullmatch(item) for item in items):
            return Column(name, "media", "pictures or sound", filled=filled)
        return Column(name, "other", "lists", filled=filled)
    if not all(isinstance(item, Mapping) for item in items):
        return Column(name, "other", "values of several kinds", filled=filled)
    shared = [str(key) for key in items[0] if all(key in item for item in items)]  # others may be the rows' own words
    return Column(name, "other", f"objects ({listed(shared)})" if shared else "objects", filled=filled)


def _describe_texts(name: str, texts: Sequence[str], *, filled: float) -> Column:
    def nearly_all(pattern: re.Pattern[str]) -> bool:
        return sum(pattern.fullmatch(text) is not None for text in texts) >= _NEARLY_ALL * len(texts)

    distinct, words = len(set(texts)), statistics.fmean(map(_num_words, texts))
    form = next((form for form, pattern in _FORMS.items() if nearly_all(pattern)), None)
    # A picture's address next to a text is mostly an ornament.
    if nearly_all(_MEDIA_FILE) and (form is None or name.lower().removesuffix("s") in NAMES["media"]):
        return Column(name, "media", "pictures or sound", filled=filled)
    if all(_is_messages(text) for text in texts):
        return Column(name, "messages", "messages as JSON text", filled=filled)
    if form is not None:
        return Column(name, "form", form, filled=filled)
    is_code = nearly_all(_CODE) and distinct >= _NEARLY_ALL * len(texts)
    is_named_id = Column(name, "id", "").has_word("id") and words < 1.5
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
    return isinstance(items, list) and bool(items) and all(map(_is_message, items))


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and any(key in item for key in ROLE_KEYS)
