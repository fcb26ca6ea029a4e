"""Encoded rows, token by token, for a person or a program to read."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.errors import DataError
from gemma_tune.text import did_you_mean


@dataclass(frozen=True, slots=True)
class PreviewToken:
    """One token."""

    id: int  # in the model's vocabulary
    piece: str  # as it stands in the vocabulary, such as `▁Paris` or `<0xF0>`
    trained: bool  # whether it is in the loss
    control: bool  # whether it is a control token, such as `<end_of_turn>`


@dataclass(frozen=True)
class PreviewRow:
    """One row as the model gets it."""

    where: str  # its place in its source
    num_tokens: int
    num_supervised: int  # in the loss
    tokens: tuple[PreviewToken, ...]  # in order, the BOS first
    text: tuple[tuple[str, bool, bool], ...]  # runs of tokens that are trained alike, decoded: (text, trained, control)

    def styled(self, *, colours: bool) -> Iterator[tuple[str, str]]:
        """Pieces of text with a rich style: every second token underlined; without colours trained text in ⟦ ⟧."""
        if colours:
            for index, token in enumerate(self.tokens):
                style = ["bold green"] * token.trained + ["reverse"] * token.control + ["underline"] * (index % 2)
                yield token.piece.replace("▁", " "), " ".join(style) or "default"
            return
        for trained, runs in groupby(self.text, key=lambda run: run[1]):
            text = "".join(run[0] for run in runs)
            yield (f"⟦{text}⟧" if trained else text), "default"


def preview_rows(
    datasets: Datasets,
    tokenizer: Any,
    *,
    control_ids: Collection[int],
    side: Literal["train", "eval"],
    count: int,
    at: str | None = None,
) -> list[PreviewRow]:
    """Take the first `count` rows of a side in the order of training, or the one that stands `at` a place.

    Raises a DataError where no row of that side stands there.
    """
    places = datasets.train_places if side == "train" else tuple(row.where for row in datasets.eval_examples)
    rows = datasets.train if side == "train" else datasets.eval
    if at is None:
        chosen = list(range(min(count, len(places))))
    elif at in places:
        chosen = [places.index(at)]
    else:
        raise DataError(
            f"no {side} row stands at {at}",
            hint=did_you_mean(at, places) or "it may have been left out, dropped, or be on the other side (--side)",
        )
    return [
        _preview(places[index], *rows.arrays(index), tokenizer=tokenizer, control_ids=control_ids) for index in chosen
    ]


def _preview(where: str, ids: Any, supervised: Any, *, tokenizer: Any, control_ids: Collection[int]) -> PreviewRow:
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    tokens = tuple(
        PreviewToken(token_id, piece, trained, token_id in control_ids)
        for token_id, piece, trained in zip(ids.tolist(), pieces, supervised.tolist(), strict=True)
    )
    runs = [
        (tokenizer.decode([token.id for token in run], skip_special_tokens=False), trained, control)
        for (trained, control), tokens_of_run in groupby(tokens, key=lambda token: (token.trained, token.control))
        for run in [list(tokens_of_run)]
    ]
    return PreviewRow(where, len(tokens), int(supervised.sum()), tokens, tuple(runs))
