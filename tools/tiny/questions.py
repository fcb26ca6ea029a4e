"""The rows that `gemma-tiny` is fine-tuned and judged on: dolly's schema, one right answer each, no overlap.

Train and eval never ask about the same person, thing, sum, town, trade, rhyme, title or story: a row's `subject` names
what it asks about, and subjects are split before rows are made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tools.tiny import documents
from tools.tiny.passages import draw_passage, notes, statements, summary, tell
from tools.tiny.world import ANIMALS, TOWNS, TRADES, Person, World, kind_of_things, with_article

# Train rows about passages: questions, extractions, summaries. With 96, 80 and 64 it got under a third of them right.
STORY_COUNTS = (320, 240, 80)
ROWS_SEED = 7
Item = TypeVar("Item")
CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)


@dataclass(frozen=True)
class Row:
    """One row in dolly's schema, and the subject it asks about (not written to the file)."""

    instruction: str
    context: str
    response: str
    category: str
    subject: str

    def to_json(self) -> str:
        fields = ("instruction", "context", "response", "category")
        return json.dumps({field: getattr(self, field) for field in fields}, ensure_ascii=False)


_PERSON_QUESTIONS: dict[Callable[[Person], str], tuple[str, ...]] = {
    documents.lives: (
        "Where does {name} live?",
        "In which town does {name} live?",
        "Name the town where {name} lives.",
    ),
    documents.works: ("What work does {name} do?", "What does {name} do for a living?", "What is the trade of {name}?"),
    documents.keeps: ("Which animal does {name} keep?", "What animal does {name} have?", "Name the animal of {name}."),
    documents.likes: (
        "Which food does {name} like?",
        "What does {name} like to eat?",
        "Name the best food for {name}.",
    ),
}
_WHO_QUESTIONS = ("Who is {name}?", "Tell me who {name} is.")
_STATEMENT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "town": ("Which town did {visitor} come to?", "Where did {visitor} go?"),
    "day": ("On which day did {visitor} come?",),
    "weather": ("How was the weather?", "What was the weather like?"),
    "trade": ("What was the trade of {visitor}?", "What work did {visitor} do?"),
    "vehicle": ("What colour was the {vehicle}?",),
    "herd": ("How many {animals} were there?",),
    "bought": ("What did {visitor} buy?", "What did {visitor} buy at the market?"),
    "meal": ("What did {visitor} eat?", "Which food did {visitor} eat?"),
}
_NOTE_QUESTIONS: dict[str, str] = {
    "visitor": "Extract the visitor from the text.",
    "town": "Extract the town from the text.",
    "day": "Extract the day from the text.",
    "trade": "Extract the trade from the text.",
    "animal": "Extract the animals from the text and how many there are.",
    "goods": "Extract the goods from the text.",
    "colour": "Extract the colour from the text.",
    "food": "Extract the food from the text.",
}
_SUMMARY_QUESTIONS = (
    "Summarize the text in one sentence.",
    "Summarize the story.",
    "What is the story about? Write one short sentence.",
)


def _person_rows(people: Sequence[Person], rng: random.Random, *, num_open: int, num_who: int) -> Iterator[Row]:
    """Ask `num_open` single facts and `num_who` short portraits, spread evenly over the people and the four facts."""
    forms = list(_PERSON_QUESTIONS)
    for index in range(num_open):
        person = people[index % len(people)]
        # The shift by one each round gives a person another fact the next time.
        form = forms[(index + index // len(people)) % len(forms)]
        question = rng.choice(_PERSON_QUESTIONS[form]).format(name=person.name)
        yield Row(question, "", form(person), "open_qa", person.name)
    for person in rng.sample(people, num_who):
        question = rng.choice(_WHO_QUESTIONS).format(name=person.name)
        yield Row(question, "", documents.who(person), "general_qa", person.name)


def _sum_rows(pairs: Sequence[tuple[int, int]], rng: random.Random) -> Iterator[Row]:
    for first, second in pairs:
        question = rng.choice(("What is {a} + {b}?", "How much is {a} + {b}?")).format(a=first, b=second)
        yield Row(question, "", documents.sum_statement(first, second), "general_qa", f"{first} + {second}")


def _story_rows(rng: random.Random, *, num_closed: int, num_extraction: int, num_summaries: int) -> Iterator[Row]:
    for index in range(num_closed):
        passage = draw_passage(rng)
        key = list(_STATEMENT_QUESTIONS)[index % len(_STATEMENT_QUESTIONS)]
        question = rng.choice(_STATEMENT_QUESTIONS[key]).format(
            visitor=passage.visitor, vehicle=passage.vehicle, animals=passage.animal.plural
        )
        text = tell(passage, rng)
        yield Row(question, text, statements(passage)[key], "closed_qa", text)
    for index in range(num_extraction):
        passage = draw_passage(rng)
        key = list(_NOTE_QUESTIONS)[index % len(_NOTE_QUESTIONS)]
        text = tell(passage, rng)
        yield Row(_NOTE_QUESTIONS[key], text, notes(passage)[key], "information_extraction", text)
    for _ in range(num_summaries):
        passage = draw_passage(rng)
        text = tell(passage, rng)
        yield Row(rng.choice(_SUMMARY_QUESTIONS), text, summary(passage), "summarization", text)


def _thing_rows(things: Sequence[str], rng: random.Random, *, num_rows: int) -> Iterator[Row]:
    kinds = kind_of_things()
    for index in range(num_rows):
        thing = things[index % len(things)]
        wrong = rng.choice(sorted(set(kinds.values()) - {kinds[thing]}))
        choices = [with_article(kind) for kind in (kinds[thing], wrong)]
        rng.shuffle(choices)
        question = f"Is {with_article(thing)} {choices[0]} or {choices[1]}?"
        yield Row(question, "", documents.kind_statement(thing, kinds[thing]), "classification", thing)


def _list_rows(trades: Sequence[str], towns: Sequence[str], rng: random.Random) -> Iterator[Row]:
    """Ask for the three tools of each trade and the three sights of each town."""
    for trade in (trade for trade in TRADES if trade.name in trades):
        for question in ("Name three things that {trade} needs.", "List three tools of {trade}."):
            text = question.format(trade=with_article(trade.name))
            yield Row(text, "", documents.toolbox(trade), "brainstorming", trade.name)
    for town in (town for town in TOWNS if town.name in towns):
        for question in ("Name three things to see in {town}.", "What could I visit in {town}?"):
            yield Row(question.format(town=town.name), "", documents.sights(town), "brainstorming", town.name)


def _creative_rows(
    titles: Sequence[tuple[str, str]], openings: Sequence[tuple[str, str]], rhymes: Sequence[str]
) -> Iterator[Row]:
    for trade, town in titles:
        question = f"Write a title for a story about {with_article(trade)} in {town}."
        yield Row(question, "", documents.title(trade, town), "creative_writing", f"{trade} {town}")
    for animal, town in openings:
        question = f"Write the first sentence of a tale about {with_article(animal)} in {town}."
        yield Row(question, "", documents.opening(animal, town), "creative_writing", f"{animal} {town}")
    for animal in rhymes:
        question = f"Write a short rhyme about {with_article(animal)}."
        yield Row(question, "", documents.rhyme(animal), "creative_writing", f"rhyme {animal}")


def _cut(items: Sequence[Item], num_eval: int, rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Return (train, eval) after a shuffle; no item is in both."""
    shuffled = rng.sample(list(items), len(items))
    return shuffled[num_eval:], shuffled[:num_eval]


def build_rows(
    world: World, *, seed: int = ROWS_SEED, story_counts: tuple[int, int, int] = STORY_COUNTS
) -> tuple[list[Row], list[Row]]:
    """Return (train rows, eval rows), each shuffled; `story_counts` are train rows about passages, as STORY_COUNTS."""
    closed, extraction, summaries = story_counts
    rng = random.Random(seed)
    addends = range(1, documents.LARGEST_ADDEND + 1)
    sums = _cut([(first, second) for first in addends for second in addends], 8, rng)
    things = _cut(sorted(kind_of_things()), 12, rng)
    trades = _cut([trade.name for trade in TRADES], 2, rng)
    towns = _cut([town.name for town in TOWNS], 2, rng)
    titles = _cut([(trade.name, town.name) for trade in TRADES for town in TOWNS], 5, rng)
    openings = _cut([(animal.name, town.name) for animal in ANIMALS for town in TOWNS], 5, rng)
    rhymes = _cut([animal.name for animal in ANIMALS], 3, rng)
    train = [
        *_person_rows(world.train_people, rng, num_open=260, num_who=60),
        *_sum_rows(sums[0], rng),
        *_story_rows(rng, num_closed=closed, num_extraction=extraction, num_summaries=summaries),
        *_thing_rows(things[0], rng, num_rows=72),
        *_list_rows(trades[0], towns[0], rng),
        *_creative_rows(titles[0][:32], openings[0][:32], rhymes[0]),
    ]
    held_out = [
        *_person_rows(world.eval_people, rng, num_open=28, num_who=8),
        *_sum_rows(sums[1], rng),
        *_story_rows(rng, num_closed=16, num_extraction=12, num_summaries=10),
        *_thing_rows(things[1], rng, num_rows=12),
        *_list_rows(trades[1], towns[1], rng),
        *_creative_rows(titles[1], openings[1], rhymes[1]),
    ]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def write_rows(folder: Path, *, world: World) -> None:
    """Write `train.jsonl` and `eval.jsonl` into the folder, which is made when it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), build_rows(world), strict=True):
        text = "".join(row.to_json() + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
