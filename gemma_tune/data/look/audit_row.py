"""One row as the audit sees it."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.data.encode.encode_rows import Side


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One rendered row."""

    where: str  # its place, such as `rows.jsonl:12`
    side: Side
    response: str  # as rendered
    key: bytes  # 16 bytes; equal rows have equal keys
    texts: tuple[tuple[str, str], ...]  # name and text of the row's own values, before templating
    category: str | None
    num_tokens: int
    num_supervised: int  # tokens in the loss
    control_strings: int  # control tokens spelled out in the row's text
