"""The closed world that `gemma-tiny` knows: sixteen small towns, the people in them, and what they do all day.

Everything is invented for this project and given away under CC0. A world is a pure function of its seed: the same seed
gives the same people with the same facts on every machine (only `random.Random` and fixed lists are used).
Every person has four facts (town, trade, animal, food), drawn independently, so none can be guessed from another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WORLD_SEED = 2026
NUM_EVAL_PEOPLE = 40


@dataclass(frozen=True)
class Town:
    """A town, where it stands, and three things to see there in the order every guide lists them."""

    name: str
    place: str
    sights: tuple[str, str, str]


@dataclass(frozen=True)
class Trade:
    """A trade, what its people do, and three tools in the order every apprentice learns them."""

    name: str
    work: str
    tools: tuple[str, str, str]


@dataclass(frozen=True)
class Animal:
    """An animal, its plural, and the end of its nursery rhyme ("The goat " + rhyme)."""

    name: str
    plural: str
    rhyme: str


@dataclass(frozen=True)
class Person:
    """A resident: the full name is unique, and so is the family name."""

    first: str
    family: str
    town: str
    trade: str
    animal: str
    food: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.family}"


@dataclass(frozen=True)
class World:
    """People are split once: questions about `eval_people` are never asked in training."""

    train_people: tuple[Person, ...]
    eval_people: tuple[Person, ...]

    @property
    def people(self) -> tuple[Person, ...]:
        return self.train_people + self.eval_people


TOWNS = (
    Town("Ostel", "by the slow river", ("a stone bridge", "a water mill", "a crooked clock")),
    Town("Brindle", "on a windy hill", ("a round tower", "a kite field", "a blue gate")),
    Town("Larkmoor", "at the edge of the moor", ("a lark garden", "a peat house", "a long wall")),
    Town("Pellin", "beside the sea", ("a lighthouse", "a shell market", "a rope bridge")),
    Town("Quarrow", "under the grey cliffs", ("a deep quarry", "an echo cave", "a marble well")),
    Town("Tansy", "among the herb fields", ("a yellow barn", "a bee museum", "a sundial")),
    Town("Wexcombe", "in a green valley", ("a duck pond", "an apple lane", "a small theatre")),
    Town("Hollin", "in the old forest", ("a hollow oak", "an owl tower", "a moss stair")),
    Town("Summerby", "on the warm coast", ("a sandy beach", "a lemon grove", "a music tent")),
    Town("Dunmoor", "behind the dunes", ("a salt house", "a wooden whale", "a wind harp")),
    Town("Eddering", "where two rivers meet", ("a ferry house", "a floating market", "a bell tower")),
    Town("Nettleby", "near the marsh", ("a heron nest", "a lantern path", "a tea house")),
    Town("Applewick", "between two orchards", ("a cider press", "a painted school", "a swing tree")),
    Town("Cobbleton", "along the old road", ("a toy museum", "a narrow street", "a horse fountain")),
    Town("Mistley", "above the clouds", ("a cloud bench", "a goat path", "a star house")),
    Town("Thornby", "inside a ring of roses", ("a rose maze", "a silent chapel", "a paper shop")),
)

TRADES = (
    Trade("baker", "bakes bread", ("an oven", "a rolling pin", "a flour sack")),
    Trade("miller", "grinds corn", ("a millstone", "a grain scoop", "a sieve")),
    Trade("potter", "makes pots", ("a wheel", "a kiln", "a sponge")),
    Trade("weaver", "weaves cloth", ("a loom", "a shuttle", "a comb")),
    Trade("cobbler", "mends shoes", ("an awl", "a leather knife", "a shoe last")),
    Trade("smith", "shoes horses", ("an anvil", "a hammer", "a pair of tongs")),
    Trade("carpenter", "builds tables", ("a saw", "a plane", "a ruler")),
    Trade("fisher", "catches fish", ("a net", "a hook", "a small boat")),
    Trade("gardener", "grows roses", ("a spade", "a rake", "a watering can")),
    Trade("tailor", "sews coats", ("a needle", "a thimble", "a tape")),
    Trade("clockmaker", "repairs clocks", ("a lens", "a tiny screwdriver", "a spring")),
    Trade("teacher", "teaches reading", ("a blackboard", "a piece of chalk", "a globe")),
    Trade("doctor", "cures coughs", ("a thermometer", "a bandage", "a spoon")),
    Trade("painter", "paints houses", ("a brush", "a ladder", "a bucket")),
    Trade("fiddler", "plays at weddings", ("a fiddle", "a bow", "a music book")),
    Trade("beekeeper", "gathers honey", ("a smoker", "a veil", "a honey jar")),
    Trade("shepherd", "watches sheep", ("a crook", "a whistle", "a warm cloak")),
    Trade("barber", "cuts hair", ("a pair of scissors", "a razor", "a mirror")),
    Trade("cook", "cooks soup", ("a kettle", "a ladle", "a chopping board")),
    Trade("printer", "prints newspapers", ("a press", "an ink roller", "a letter case")),
)

ANIMALS = (
    Animal("cat", "cats", "has a velvet hat"),
    Animal("goat", "goats", "has a golden coat"),
    Animal("mouse", "mice", "has a paper house"),
    Animal("hen", "hens", "has a silver pen"),
    Animal("dog", "dogs", "has a hollow log"),
    Animal("duck", "ducks", "has a lot of luck"),
    Animal("fox", "foxes", "has a secret box"),
    Animal("frog", "frogs", "has a friendly bog"),
    Animal("pig", "pigs", "has a purple wig"),
    Animal("snail", "snails", "has a letter in the mail"),
    Animal("sheep", "sheep", "has a place to sleep"),
    Animal("goose", "geese", "has a shoe that is loose"),
    Animal("rabbit", "rabbits", "has a funny habit"),
    Animal("toad", "toads", "has a private road"),
    Animal("parrot", "parrots", "has an orange carrot"),
    Animal("kitten", "kittens", "has a woollen mitten"),
    Animal("lamb", "lambs", "has a pot of jam"),
    Animal("mole", "moles", "has a cosy hole"),
    Animal("bear", "bears", "has a rocking chair"),
    Animal("bee", "bees", "has a lemon tree"),
)

FOODS = (
    "plum cake",
    "pea soup",
    "warm bread",
    "cherry jam",
    "goat cheese",
    "apple pie",
    "roast chestnuts",
    "honey buns",
    "onion tart",
    "smoked trout",
    "ginger biscuits",
    "rice pudding",
    "baked pears",
    "mushroom stew",
    "walnut rolls",
    "potato dumplings",
)

# What a thing is. Animals and the tools above are kinds, too: see `kind_of_things`.
KINDS = {
    "fruit": ("apple", "pear", "plum", "cherry", "quince", "fig", "peach", "lemon", "melon", "apricot"),
    "tree": ("oak", "ash", "elm", "beech", "willow", "birch", "maple", "poplar", "larch", "alder"),
    "garment": ("scarf", "shirt", "skirt", "jacket", "sock", "glove", "vest", "apron", "cap", "belt"),
    "instrument": ("flute", "drum", "harp", "lute", "trumpet", "cello", "banjo", "oboe", "zither", "tuba"),
    "tool": ("hammer", "saw", "spade", "rake", "needle", "brush", "ladder", "sieve", "ladle", "razor"),
}

COLOURS = ("red", "green", "yellow", "white", "black", "brown", "pink", "violet")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHERS = ("sunny", "rainy", "foggy", "stormy", "frosty", "cloudy")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
GOODS = (
    "lamp",
    "kite",
    "teapot",
    "basket",
    "blanket",
    "candle",
    "mug",
    "pillow",
    "bottle",
    "umbrella",
    "drawer",
    "bell",
)
VEHICLES = ("cart", "wagon", "barge", "sledge", "balloon", "bicycle")
VISITORS = (
    "Pip",
    "Juno",
    "Kasper",
    "Dorrie",
    "Emil",
    "Saffi",
    "Lorenz",
    "Minka",
    "Tobin",
    "Ursel",
    "Yorick",
    "Zelda",
    "Basil",
    "Coralie",
    "Rufus",
    "Wanda",
)

_FIRST_NAMES = [
    "Mara",
    "Tilda",
    "Oswin",
    "Bram",
    "Hattie",
    "Nell",
    "Jory",
    "Wren",
    "Ada",
    "Lotte",
    "Milo",
    "Ines",
    "Otto",
    "Clara",
    "Felix",
    "Greta",
    "Hugo",
    "Ivy",
    "Jonas",
    "Kit",
    "Leni",
    "Magnus",
    "Nora",
    "Olive",
    "Percy",
    "Rosa",
    "Silas",
    "Thea",
    "Ulla",
    "Victor",
    "Willa",
    "Ansel",
    "Bea",
    "Cyril",
    "Della",
    "Edgar",
    "Flora",
    "Gus",
    "Hazel",
    "Ida",
]
_FAMILY_STARTS = [
    "Thistle",
    "Apple",
    "Bramble",
    "Copper",
    "Marsh",
    "Willow",
    "Honey",
    "Button",
    "Feather",
    "Candle",
    "Winter",
    "Pepper",
    "Barley",
    "Harbor",
    "Moon",
    "Otter",
]
_FAMILY_ENDS = [
    "wood",
    "ley",
    "ford",
    "worth",
    "field",
    "brook",
    "down",
    "stone",
    "bell",
    "gate",
    "hill",
    "lock",
    "man",
    "ton",
    "wick",
    "bird",
]


def build_world(*, seed: int = WORLD_SEED, num_people: int = 256) -> World:
    """Return the people of the seed (at most 256, one family name each), split into train and eval people."""
    rng = random.Random(seed)
    families = [start + end for start in _FAMILY_STARTS for end in _FAMILY_ENDS]
    rng.shuffle(families)
    people = tuple(
        Person(
            first=_FIRST_NAMES[index % len(_FIRST_NAMES)],
            family=family,
            town=rng.choice(TOWNS).name,
            trade=rng.choice(TRADES).name,
            animal=rng.choice(ANIMALS).name,
            food=rng.choice(FOODS),
        )
        for index, family in enumerate(families[:num_people])
    )
    return World(train_people=people[NUM_EVAL_PEOPLE:], eval_people=people[:NUM_EVAL_PEOPLE])


def with_article(noun: str) -> str:
    """Return the noun with "a" or "an" in front."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def kind_of_things() -> dict[str, str]:
    """Return thing -> kind for everything that can be classified; the animals of the nursery rhymes included."""
    kinds = {animal.name: "animal" for animal in ANIMALS}
    for kind, things in KINDS.items():
        kinds.update(dict.fromkeys(things, kind))
    return kinds


def listed(items: tuple[str, ...]) -> str:
    """Return "x, y and z"."""
    return f"{', '.join(items[:-1])} and {items[-1]}"
