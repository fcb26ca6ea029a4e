"""One row as the audit sees it."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.data.encode.encode_rows import Side


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One rendered row.

    Attributes:
        where: its place, such as `rows.jsonl:12`.
        side: whether it is trained on or evaluated.
        response: as rendered.
        key: 16 bytes; equal rows have equal keys.
        texts: name and text of the row's own values, before templating.
        category: the row's category, where it has one.
        num_tokens, num_supervised: tokens in all and in the loss.
        control_strings: control tokens spelled out in the row's text.
    """

    where: str
    side: Side
    response: str
    key: bytes
    texts: tuple[tuple[str, str], ...]
    category: str | None
    num_tokens: int
    num_supervised: int
    control_strings: int
