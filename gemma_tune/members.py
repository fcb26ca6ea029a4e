"""Tables of named members: an engine, method, export format or model family is one file and one row of one of these."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from gemma_tune.errors import GemmaTuneError
from gemma_tune.text import suggestion


class Named(Protocol):
    """What every member has."""

    @property
    def name(self) -> str: ...


Member = TypeVar("Member", bound=Named)


class Members(Mapping[str, Member], Generic[Member]):
    """The members of one kind by name, in the order in which they were added."""

    def __init__(self, kind: str, members: Iterable[Member] = ()) -> None:
        """Begin a table.

        Args:
            kind: what a member is called in messages, such as "export format".
        """
        self.kind = kind
        self._members: dict[str, Member] = {}
        for member in members:
            self.add(member)

    def add(self, member: Member) -> None:
        """Add a member; a name that is taken is a mistake of the program.

        Raises:
            ValueError: the name is taken.
        """
        if member.name in self._members:
            raise ValueError(f"there is already a {self.kind} named {member.name!r}")
        self._members[member.name] = member

    def remove(self, name: str) -> None:
        """Remove a member that was added."""
        del self._members[name]

    def find(self, name: str, *, error: type[GemmaTuneError]) -> Member:
        """Return the member of this name.

        Raises:
            GemmaTuneError: of the given class, naming the nearest name and all of them.
        """
        if name in self._members:
            return self._members[name]
        raise error(
            f"there is no {self.kind} {name!r}{suggestion(name, self._members)}",
            hint=f"choose from: {', '.join(self._members)}",
        )

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
