"""Which keys a recipe has, within which bounds, and where a key belongs that stands elsewhere or comes from others."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gemma_tune.errors import RecipeError
from gemma_tune.paths import read_table
from gemma_tune.text import did_you_mean

_FOREIGN = read_table("recipe/foreign_keys.toml")
_KEYS: Mapping[str, str] = _FOREIGN["keys"]
_TRAINERS = {trainer: frozenset(keys) for trainer, keys in _FOREIGN["trainers"].items()}
_MIN_MARKS = 2
_KEY = re.compile(r"[A-Za-z_][\w-]{0,39}", re.ASCII)


def refuse_foreign(values: Mapping[str, Any], *, label: str) -> None:
    """Refuse the configuration of another trainer in a sentence, not key by key.

    Raises:
        RecipeError: naming the trainer, and what each of the keys is called here.
    """
    marks = {trainer: len(own & values.keys()) for trainer, own in _TRAINERS.items()}
    trainer = max(marks, key=lambda name: marks[name])
    if marks[trainer] < _MIN_MARKS:
        return
    same = [f"{key} is {_KEYS[key]}" for key in values if key in _KEYS]
    raise RecipeError(
        f"{label} is a configuration of {trainer}, not a recipe of gemma-tune",
        hint=f"gemma-tune init ROWS writes a recipe for your rows; in it, {'; '.join(same)}",
    )


def field_at(root: type[BaseModel], location: Sequence[int | str]) -> FieldInfo | None:
    """The field at a place; numbers are entries of a list."""
    section: type[BaseModel] | None = root
    field = None
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = _section_of(field.annotation) if field else None
    return field


def section_at(root: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The section at a place, such as that of an entry of `data.mix`."""
    if not location:
        return root
    field = field_at(root, location)
    return _section_of(field.annotation) if field else None


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a type holds: alone, in a list, or with None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_of(each))), None)


def places_of(root: type[BaseModel], key: str) -> list[str]:
    """The paths of the sections' fields of this name; entries of lists aside."""
    return [
        f"{name}.{key}"
        for name, field in root.model_fields.items()
        if isinstance(field.annotation, type) and key in getattr(field.annotation, "model_fields", ())
    ]


def hint_for(root: type[BaseModel], location: Sequence[int | str]) -> str:
    """What to write in the place of an unknown key."""
    *above, last = location
    section, key = section_at(root, above), str(last)
    names = list(section.model_fields) if section else []
    if places := places_of(root, key):
        return f"write it as {' or '.join(places)}"
    if (there := _KEYS.get(key)) and field_at(root, there.split(".")):
        return f"here it is {there}"
    return did_you_mean(key, names) or f"allowed: {', '.join(names)}"


def is_like_a_key(text: str) -> bool:
    """Whether a message may repeat it: somebody's rows may have been taken for a recipe."""
    return bool(_KEY.fullmatch(text))


def bounds_of(field: FieldInfo) -> str:
    """Return `from 1 to 1024` or `above 0 and below 1`; nothing for what is not a number."""
    found: dict[str, object] = {}
    for mark in _marks_in(field.annotation, field.metadata):
        for name in ("ge", "gt", "le", "lt"):
            if hasattr(mark, name):
                found[name] = getattr(mark, name)
    return in_words(found)


def in_words(bounds: Mapping[str, object]) -> str:
    """Return bounds by pydantic's names, `ge`, `gt`, `le` and `lt`, as a message says them."""
    if bounds.keys() >= {"ge", "le"}:
        return f"from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items() if name in words)


def _marks_in(annotation: Any, metadata: Sequence[Any]) -> Iterator[Any]:
    """What annotates a type, and the types that it is made of."""
    for mark in metadata:
        yield from mark.metadata if isinstance(mark, FieldInfo) else [mark]
    for each in get_args(annotation):
        yield from _marks_in(each, getattr(each, "__metadata__", ()))
