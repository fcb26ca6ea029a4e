"""Short market-day stories about visitors, each with the one-line statements that follow from it.

The base model reads stories followed by some of their statements; the rows ask for one statement about a new story.
A story is drawn afresh each time, so what has to be learnt is to read and to copy, not to remember.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.tiny.world import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    GOODS,
    NUMBERS,
    TOWNS,
    TRADES,
    VEHICLES,
    VISITORS,
    WEATHERS,
    Animal,
    with_article,
)


@dataclass(frozen=True)
class Passage:
    """What happens in one story."""

    visitor: str
    trade: str
    town: str
    day: str
    weather: str
    colour: str
    vehicle: str
    number: str
    animal: Animal
    bought: str
    food: str


def draw_passage(rng: random.Random) -> Passage:
    """Return a random story; there are more than ten million million of them."""
    return Passage(
        visitor=rng.choice(VISITORS),
        trade=rng.choice(TRADES).name,
        town=rng.choice(TOWNS).name,
        day=rng.choice(DAYS),
        weather=rng.choice(WEATHERS),
        colour=rng.choice(COLOURS),
        vehicle=rng.choice(VEHICLES),
        number=rng.choice(NUMBERS),
        animal=rng.choice(ANIMALS),
        bought=rng.choice(GOODS),
        food=rng.choice(FOODS),
    )


def tell(passage: Passage, rng: random.Random) -> str:
    """Return the story in four sentences on one line, each sentence in one of its forms."""
    p = passage
    arrival = rng.choice(
        (
            f"On a {p.weather} {p.day} {p.visitor} the {p.trade} came to {p.town} with a {p.colour} {p.vehicle}.",
            f"{p.visitor} the {p.trade} reached {p.town} on a {p.weather} {p.day} in a {p.colour} {p.vehicle}.",
            f"It was a {p.weather} {p.day} when {p.visitor} the {p.trade} took a {p.colour} {p.vehicle} to {p.town}.",
        )
    )
    herd = rng.choice(
        (
            f"Behind the {p.vehicle} walked {p.number} {p.animal.plural}.",
            f"The {p.number} {p.animal.plural} that came along were very tired.",
            f"Children laughed at the {p.number} {p.animal.plural} on the {p.vehicle}.",
        )
    )
    purchase = rng.choice(
        (
            f"At the market {p.visitor} bought {with_article(p.bought)}.",
            f"{p.visitor} found {with_article(p.bought)} at the market and bought it.",
        )
    )
    meal = rng.choice((f"For supper the inn served {p.food}.", f"{p.visitor} ate {p.food} before the journey home."))
    return " ".join((arrival, herd, purchase, meal))


def statements(passage: Passage) -> dict[str, str]:
    """Return subject -> the one sentence that states it, in the form used in the base's text and in the answers."""
    p = passage
    return {
        "town": f"{p.visitor} came to {p.town}.",
        "day": f"{p.visitor} came on a {p.day}.",
        "weather": f"The weather was {p.weather}.",
        "trade": f"{p.visitor} was {with_article(p.trade)}.",
        "vehicle": f"The {p.vehicle} was {p.colour}.",
        "herd": f"There were {p.number} {p.animal.plural}.",
        "bought": f"{p.visitor} bought {with_article(p.bought)}.",
        "meal": f"{p.visitor} ate {p.food}.",
    }


def notes(passage: Passage) -> dict[str, str]:
    """Return subject -> a line of the innkeeper's notebook."""
    p = passage
    return {
        "visitor": f"Visitor: {p.visitor}",
        "town": f"Town: {p.town}",
        "day": f"Day: {p.day}",
        "trade": f"Trade: {p.trade}",
        "animal": f"Animals: {p.number} {p.animal.plural}",
        "goods": f"Goods: {p.bought}",
        "colour": f"Colour: {p.colour}",
        "food": f"Food: {p.food}",
    }


def summary(passage: Passage) -> str:
    """Return the story in one sentence."""
    p = passage
    return f"In short, {p.visitor} the {p.trade} came to {p.town} and bought {with_article(p.bought)}."
