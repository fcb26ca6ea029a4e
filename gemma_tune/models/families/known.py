"""The families that can be trained, and what holds for all of them together."""

from gemma_tune.members import Members
from gemma_tune.models.families.family import Family, read_family

FAMILIES: Members[Family] = Members(
    "model family", map(read_family, ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4"))
)


def find_family(model_type: object) -> Family | None:
    """Return the family of a config.json's `model_type`, None for one that is not a Gemma's."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)


def supported_types() -> list[str]:
    """List every `model_type` that can be trained."""
    return sorted(model_type for family in FAMILIES.values() for model_type in family.model_types)


def tower_names() -> tuple[str, ...]:
    """List the modules for images and audio of all families, which a text run never trains."""
    return tuple(dict.fromkeys(tower for family in FAMILIES.values() for tower in family.towers))


def turn_ends() -> tuple[str, ...]:
    """List the tokens that end a turn in the chat templates of all families."""
    return tuple(dict.fromkeys(family.turn_end for family in FAMILIES.values()))


def canonical_name(name: str) -> str:
    """Return the one name of a Gemma weight or module, whichever release of transformers it was saved by.

    An adapter of one family can be named by the model of another release, so all families' renames are tried.
    """
    for start, replacement in dict.fromkeys(rename for family in FAMILIES.values() for rename in family.renames):
        if name.startswith(start):
            name = replacement + name.removeprefix(start)
    return name
