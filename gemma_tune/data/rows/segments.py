"""What a rendered row is made of: text that knows whether it is trained and whose text it is."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered row.

    Attributes:
        text: the piece; empty when `stop`.
        supervised: whether its tokens are in the loss.
        control: True for template text, in which control tokens are meant; False for a row's own text, which is encoded
            as plain text whatever it holds.
        stop: the tokenizer's end-of-text token, whatever its name.
    """

    text: str
    supervised: bool
    control: bool
    stop: bool = False

    @property
    def is_row_prompt(self) -> bool:
        """Whether this is a row's own text outside the loss."""
        return not (self.supervised or self.control)


class RowError(DataError):
    """One row that cannot be used: `where` it stands and the `problem`."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem
