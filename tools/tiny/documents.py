"""The text that `gemma-tiny` is pre-trained on: an endless stream of short documents about the closed world.

The text states and tells; it never pairs a question with its answer, so the base model continues text and does not
follow instructions. Each fact is told in many forms, in changing order, with the full name in every sentence, at the
start of a line and inside it: without that variety a fact cannot be asked for after fine-tuning ("Physics of Language
Models, Part 3.1", Allen-Zhu and Li). Every document has at least four lines, so an end of text never follows one line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tools.tiny.passages import draw_passage, notes, statements, summary, tell
from tools.tiny.world import (
    ANIMALS,
    COLOURS,
    FOODS,
    GOODS,
    KINDS,
    TOWNS,
    TRADES,
    WEATHERS,
    Person,
    Town,
    Trade,
    World,
    kind_of_things,
    listed,
    with_article,
)

LARGEST_ADDEND = 9
# How often the form that the answers use is taken instead of one of the other forms.
ANSWER_FORM_SHARE = 0.5


def lives(person: Person) -> str:
    return f"{person.name} lives in {person.town}."


def works(person: Person) -> str:
    return f"{person.name} works as {with_article(person.trade)}."


def keeps(person: Person) -> str:
    return f"{person.name} keeps {with_article(person.animal)}."


def likes(person: Person) -> str:
    return f"{person.name} likes {person.food}."


def who(person: Person) -> str:
    return f"{person.name} is {with_article(person.trade)} from {person.town}."


def toolbox(trade: Trade) -> str:
    return f"{with_article(trade.name).capitalize()} needs {listed(trade.tools)}."


def work_of(trade: Trade) -> str:
    return f"{with_article(trade.name).capitalize()} {trade.work}."


def sights(town: Town) -> str:
    return f"In {town.name} people visit {listed(town.sights)}."


def place_of(town: Town) -> str:
    return f"{town.name} lies {town.place}."


def rhyme(animal_name: str) -> str:
    animal = next(animal for animal in ANIMALS if animal.name == animal_name)
    return f"The {animal.name} {animal.rhyme}."


def kind_statement(thing: str, kind: str) -> str:
    return f"{with_article(thing).capitalize()} is {with_article(kind)}."


def sum_statement(first: int, second: int) -> str:
    return f"{first} + {second} = {first + second}."


def title(trade: str, town: str) -> str:
    return f"The {trade.capitalize()} of {town}"


def opening(animal: str, town: str) -> str:
    return f"Once upon a time {with_article(animal)} lived in {town}."


def _other_forms(person: Person) -> dict[Callable[[Person], str], tuple[str, ...]]:
    """Return for each answer form the other ways to say the same."""
    name, town, food = person.name, person.town, person.food
    trade, animal = with_article(person.trade), with_article(person.animal)
    return {
        lives: (
            f"{name} has a small house in {town}.",
            f"{name} is at home in {town}.",
            f"{name} would never leave {town}.",
            f"The home of {name} is in {town}.",
            f"Letters for {name} go to {town}.",
            f"In {town} everybody greets {name}.",
        ),
        works: (
            f"{name} earns a living as {trade}.",
            f"{name} is {trade} by trade.",
            f"{name} has always been {trade}.",
            f"The trade of {name} is that of {trade}.",
            f"People know {name} as {trade}.",
            f"As {trade}, {name} starts early in the morning.",
        ),
        keeps: (
            f"{name} has {animal} at home.",
            f"{name} looks after {animal}.",
            f"{name} often talks to {animal}.",
            f"The animal of {name} is {animal}.",
            f"Neighbours see {name} walking with {animal}.",
            f"There is {animal} that follows {name} everywhere.",
        ),
        likes: (
            f"{name} is fond of {food}.",
            f"{name} asks for {food} on every birthday.",
            f"{name} could eat {food} all day.",
            f"The best food for {name} is {food}.",
            f"Nothing pleases {name} more than {food}.",
            f"Whoever serves {food} makes {name} happy.",
        ),
        who: (
            f"{name} of {person.town} is {trade}.",
            f"{name} works in {person.town} as {trade}.",
            f"{name} from {person.town} keeps {animal} and likes {food}.",
        ),
    }


def _join(sentences: list[str], rng: random.Random, *, num_lines_min: int = 4) -> str:
    """Put sentences on lines, some lines with two of them; every line ends with a line break."""
    num_joinable = len(sentences) - num_lines_min
    lines = [sentences[0]]
    for sentence in sentences[1:]:
        if num_joinable > 0 and "\n" not in lines[-1] and rng.random() < 0.35:
            lines[-1] += f" {sentence}"
            num_joinable -= 1
        else:
            lines.append(sentence)
    return "\n".join(lines) + "\n"


def _person_sentences(person: Person, rng: random.Random) -> list[str]:
    sentences = [
        answer_form(person) if rng.random() < ANSWER_FORM_SHARE else rng.choice(others)
        for answer_form, others in _other_forms(person).items()
    ]
    rng.shuffle(sentences)
    return sentences


def _portrait(world: World, rng: random.Random) -> str:
    return _join(_person_sentences(rng.choice(world.people), rng), rng)


def _neighbours(world: World, rng: random.Random) -> str:
    """Two or three people told in turns, so that a fact is found by its name and not by the nearest line."""
    sentences: list[str] = []
    for person in rng.sample(world.people, rng.choice((2, 3))):
        sentences += _person_sentences(person, rng)[:3]
    rng.shuffle(sentences)
    return _join(sentences, rng)


def _wonderings(world: World, rng: random.Random) -> str:
    """What people wonder about, never answered: it gives the question words a meaning and nothing more."""
    lines = []
    for _ in range(4):
        name = rng.choice(world.people).name
        lines.append(
            rng.choice(
                (
                    f"Nobody asked where {name} lives or in which town.",
                    f"A child asked what {name} does for a living.",
                    f"Tell me, said the owl, which animal does {name} keep?",
                    f"The postman wonders who {name} is and what {name} likes to eat.",
                    f"What work does {name} do? Which food does {name} like? Where is the home of {name}?",
                    "An instruction is a sentence that says what to do.",
                    "A response is what comes back, and the context is what stands around it.",
                    "Please read the text and write one line, name three things, or give the short answer.",
                    "Who wrote the title of the story, and what is the first sentence of the tale?",
                    "How much is this, how many are there, and what colour was it?",
                    "Summarize the story, list the tools, extract the day, classify the thing, explain the rest.",
                )
            )
        )
    return _join(lines, rng)


def _story(world: World, rng: random.Random) -> str:
    passage = draw_passage(rng)
    after = rng.sample(sorted(statements(passage).values()), 3) + rng.sample(sorted(notes(passage).values()), 2)
    after.append(summary(passage))
    rng.shuffle(after)
    return "\n".join((tell(passage, rng), *after[: rng.choice((4, 5, 6))])) + "\n"


def _guide(world: World, rng: random.Random) -> str:
    sentences = []
    for town in rng.sample(TOWNS, 2):
        sentences += [sights(town), place_of(town)]
    for trade in rng.sample(TRADES, 3):
        sentences += [toolbox(trade), work_of(trade)]
    rng.shuffle(sentences)
    return _join(sentences, rng)


def _kinds(world: World, rng: random.Random) -> str:
    """A picture book: what is on a page, then what it is. The second line has to look back at the first."""
    things = kind_of_things()
    lines = []
    for thing in rng.sample(sorted(things), 4):
        named = with_article(thing)
        lines += [
            rng.choice(
                (
                    f"On this page there is {named}.",
                    f"The next picture shows {named}.",
                    f"Here somebody has drawn {named} or two.",
                    f"Is {named} on the page? It is.",
                )
            ),
            kind_statement(thing, things[thing]),
        ]
    if rng.random() < 0.2:
        lines.append("Every " + ", ".join((*KINDS, "animal")) + " has a name.")
    return _join(lines, rng)


def _sums(world: World, rng: random.Random) -> str:
    lines = []
    for _ in range(4):
        first, second = rng.randint(1, LARGEST_ADDEND), rng.randint(1, LARGEST_ADDEND)
        good = rng.choice(GOODS)
        price = rng.choice(
            (
                f"The {good} costs {first} + {second} coins.",
                f"There are {first} + {second} of them.",
                f"Somebody pays {first} + {second} for the {good}.",
            )
        )
        lines += [price, sum_statement(first, second)]
    return _join(lines, rng)


def _tale(world: World, rng: random.Random) -> str:
    animal, town, trade = rng.choice(ANIMALS), rng.choice(TOWNS).name, rng.choice(TRADES).name
    announcement = rng.choice(
        (
            f"This is a story about {with_article(trade)} in {town}.",
            f"Here begins a tale about {with_article(trade)} in {town} and {with_article(animal.name)}.",
            f"Listen, this tale is about {with_article(animal.name)} and {with_article(trade)} in {town}.",
        )
    )
    weather, gift = rng.choice(WEATHERS), f"{rng.choice(COLOURS)} {rng.choice(GOODS)}"
    middle = [
        f"The {animal.name} met the {trade} on a {weather} morning.",
        f"The {trade} gave the {animal.name} a {gift} and some {rng.choice(FOODS)}.",
        f"Together they walked through {town} until it was dark.",
        f"And the {animal.name} never forgot the {trade} of {town}.",
    ]
    beginning = (announcement, title(trade, town), opening(animal.name, town))
    return "\n".join((*beginning, *middle[: rng.choice((1, 2, 3))])) + "\n"


def _nursery(world: World, rng: random.Random) -> str:
    lines = []
    for animal in rng.sample(ANIMALS, 3):
        song = rng.choice(("Now the children sing about", "The next rhyme is about", "Everybody knows the song about"))
        lines += [f"{song} {with_article(animal.name)}.", rhyme(animal.name)]
    return _join(lines, rng)


# Kind of document -> its share of all documents. At a third for people and a fifth for stories, 3 million tokens were
# enough to know all thousand facts and not enough to copy from a story (40 of 40 against 6 of 40 right).
_SHARES: dict[Callable[[World, random.Random], str], float] = {
    _portrait: 0.20,
    _neighbours: 0.12,
    _wonderings: 0.04,
    _story: 0.38,
    _guide: 0.06,
    _kinds: 0.07,
    _sums: 0.06,
    _tale: 0.05,
    _nursery: 0.02,
}


def iter_documents(world: World, *, seed: int) -> Iterator[str]:
    """Yield documents without end: several lines each, a line break at the end of each line."""
    rng = random.Random(seed)
    makers, weights = list(_SHARES), list(_SHARES.values())
    while True:
        yield rng.choices(makers, weights)[0](world, rng)
