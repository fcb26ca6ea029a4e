"""What a row holds besides what its template reads: named where it changes nothing, else the row is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gemma_tune.data.rows.segments import RowError
from gemma_tune.recipe.schema import DataSection
from gemma_tune.text import counted, listed, shorten, suggestion
from gemma_tune.yaml_io import yaml_scalar

# Keys of rows and messages, and types of content parts, without which a conversation is another one, and what they
# hold. What a template reads of them is rendered; a row with another one is refused, or trained without it when
# `data.drop_fields` names it.
CONVERSATION_KEYS: Mapping[str, str] = {
    "system": "a system turn",
    "history": "earlier turns",
    **dict.fromkeys(("tools", "functions"), "tools to call"),
    **dict.fromkeys(("tool_calls", "function_call"), "calls of tools"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts"), "thoughts before an answer"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "what is seen or heard"),
    **dict.fromkeys(("weight", "train"), "whether a turn is learned"),
    **dict.fromkeys(("documents", "refusal", "chat_template_kwargs"), "what some chat templates print"),
}
MESSAGE_KEYS = {**CONVERSATION_KEYS, "name": "who speaks"}
# Values that ask for what is done anyway.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {"weight": (1,), "train": (True,)}
_MOST_NAMES = 1_000  # rows may have keys of their own


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a source are spelled."""

    columns: Mapping[str, str] = field(default_factory=dict)  # template field → column of the rows
    roles: Mapping[str, str] = field(default_factory=dict)  # the rows' own, in lower case → system, user or assistant
    drop_fields: tuple[str, ...] = ()  # keys of rows and messages that rows are trained without

    @classmethod
    def of(cls, section: DataSection, columns: Mapping[str, str] | None = None) -> RowFormat:
        """Take what a recipe says of rows; `columns` other than the section's own are those of a part of the mix."""
        roles = {role.strip().lower(): known for role, known in section.roles.items()}
        return cls(section.columns if columns is None else columns, roles, section.drop_fields)


AS_THEY_STAND = RowFormat()


@dataclass
class Unread:
    """What of one row is not read."""

    drop_fields: Collection[str] = ()
    unused: dict[str, None] = field(default_factory=dict)  # names that change nothing, in their order
    dropped: set[str] = field(default_factory=set)  # names in `drop_fields`
    lost: dict[str, str] = field(default_factory=dict)  # names that would be cut → the first place of each
    roles: dict[str, str] = field(default_factory=dict)  # unknown ones → what each probably is
    is_developer: bool = False  # whether a developer turn is read as a system turn
    is_folded: bool = False  # whether a system turn stands in the first user message

    def keep(self, values: Mapping[str, object], read: Collection[str], *, at: str = "") -> dict[str, object]:
        """Return what stands under the names in `read`, and note the others. `at` names a message, such as `m[0]`."""
        known = MESSAGE_KEYS if at else CONVERSATION_KEYS
        kept = {}
        for name, value in values.items():
            if name in read and name not in self.drop_fields:
                kept[name] = value
            elif _is_empty(value) or (name == "label" and isinstance(value, bool)):
                continue  # a boolean label is KTO's mark, which has a note of its own
            elif name in self.drop_fields:
                self.dropped.add(name)
            elif name not in known:
                self.unused[f"{at.partition('[')[0]}[].{name}" if at else name] = None
            elif value not in _NEUTRAL.get(name, ()):
                self.lose(name, f"{at}.{name}" if at else name)
        return kept

    def lose(self, name: str, place: str) -> None:
        """Note something at a place that cannot be rendered, unless `drop_fields` names it."""
        if name in self.drop_fields:
            self.dropped.add(name)
        else:
            self.lost.setdefault(name, place)

    def check(self, where: str) -> None:
        """Raise a RowError where something would be cut, or a role is unknown."""
        if self.roles:
            unknown = "unknown role" + "s" * (len(self.roles) > 1)
            names = ", ".join(repr(shorten(role, num_chars=40)) for role in self.roles)
            raise RowError(where, f"{unknown} {names}; {roles_setting(self.roles)} says who speaks")
        if self.lost:
            problem = f"{listed(list(self.lost.values()), shown=5)} cannot be rendered"
            raise RowError(where, f"{problem}; {drop_setting(self.lost)} trains the row without")


@dataclass
class Tally:
    """What is not read of the rows of a source, counted by rows."""

    unused_rows: int = 0  # rows with at least one of them
    unused: dict[str, None] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    roles: dict[str, str] = field(default_factory=dict)
    developer_rows: int = 0
    folded_rows: int = 0
    spelled: Counter[str] = field(default_factory=Counter)  # columns whose numbers and the like are read as text

    def add(self, unread: Unread) -> None:
        """Count one row."""
        self.unused_rows += bool(unread.unused)
        for mine, others in ((self.unused, unread.unused), (self.roles, unread.roles)):
            if len(mine) < _MOST_NAMES:
                mine |= others  # type: ignore[operator]
        self.dropped.update(unread.dropped)
        self.lost.update(unread.lost.keys())
        self.developer_rows += unread.is_developer
        self.folded_rows += unread.is_folded

    def notes(self) -> Iterator[str]:
        """Say what was met, a sentence each."""
        if self.unused:
            columns = f"{counted(len(self.unused), 'column')} {'is' if len(self.unused) == 1 else 'are'} not used"
            yield f"{columns}: {listed(list(self.unused), shown=8)} (in {counted(self.unused_rows, 'row')})"
        for name, count in self.dropped.items():
            yield f"{name} is left out of {counted(count, 'row')} (data.drop_fields)"
        if self.lost:
            rows = ", ".join(f"{name} in {counted(count, 'row')}" for name, count in self.lost.items())
            yield f"refused for what cannot be rendered: {rows}; {drop_setting(self.lost)} trains such rows without"
        for name, count in self.spelled.items():
            said = "numbers, truth values or dates, which are read as text (42, 1.5, true, 2024-01-05)"
            yield f"{name} holds {said} in {counted(count, 'row')}"
        if self.developer_rows:
            yield f"developer turns are read as system turns (in {counted(self.developer_rows, 'row')})"
        if self.folded_rows:
            rows = counted(self.folded_rows, "row")
            yield f"the model has no system turn: its text stands before the first user message (in {rows})"

    def hint(self) -> str | None:
        """Say which setting makes the refused rows usable."""
        setting = roles_setting(self.roles) if self.roles else drop_setting(self.lost) if self.lost else None
        if setting is None:
            return None
        in_recipe, on_command = setting.removeprefix("data."), setting.replace(": ", "=", 1)
        return f"write `{in_recipe}` under `data:` in the recipe, or '{on_command}' behind the command"


def unread_notes(tallies: Sequence[tuple[str, Tally]], drop_fields: Sequence[str]) -> Iterator[str]:
    """Say what was met in each source, by its label, and what `data.drop_fields` names and no row holds."""
    for label, tally in tallies:
        yield from (f"{label}: {note}" if len(tallies) > 1 else note for note in tally.notes())
    held = {name for _, tally in tallies for name in (*tally.dropped, *tally.unused, *tally.lost)}
    for name in drop_fields:
        if not any(name in tally.dropped for _, tally in tallies):
            yield f"data.drop_fields: no row holds {name}{suggestion(name, held)}"


def drop_setting(names: Collection[str]) -> str:
    """Write the setting that drops these names."""
    return f"data.drop_fields: [{', '.join(map(yaml_scalar, names))}]"


def roles_setting(roles: Mapping[str, str]) -> str:
    """Write the setting that names these roles."""
    pairs = ", ".join(f"{yaml_scalar(shorten(role, num_chars=40))}: {known}" for role, known in roles.items())
    return f"data.roles: {{{pairs}}}"


def _is_empty(value: object) -> bool:
    """Whether a value says nothing; also a NaN, which is what tables have in empty cells."""
    return value is None or value != value or value in ({}, [], ()) or (isinstance(value, str) and not value.strip())
