"""What a rendered row is made of: text that knows whether it is trained and whose text it is."""

from dataclasses import dataclass

from gemma_tune.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered row."""

    text: str  # empty when `stop`
    supervised: bool  # whether its tokens are in the loss
    control: bool  # template text, in which control tokens are meant; a row's own text is always encoded as plain text
    stop: bool = False  # the tokenizer's end-of-text token, whatever its name


class RowError(DataError):
    """One row that cannot be used: `where` it stands and the `problem`."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem
