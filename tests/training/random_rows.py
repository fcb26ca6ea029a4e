"""Rows of random ids, for models that know no language."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemma_tune.data.encode.arrays import IGNORED, EncodedRow, EncodedRows

VOCAB = 320


def make_rows(count: int, *, seed: int, shortest: int = 4, longest: int = 30) -> list[EncodedRow]:
    """About half of each row is supervised, the last token always is."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = [2, *torch.randint(4, VOCAB, (length,), generator=generator).tolist()]
        first = 1 + length // 2
        rows.append(EncodedRow(ids, [IGNORED] * first + ids[first:]))
    return rows


class Rows:
    """The part of `Datasets` that training reads."""

    def __init__(self, train: Sequence[EncodedRow], eval: Sequence[EncodedRow] = ()) -> None:
        self.train = EncodedRows.from_rows(train)
        self.eval = EncodedRows.from_rows(eval)
