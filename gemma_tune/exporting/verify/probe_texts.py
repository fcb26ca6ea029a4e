"""What the forms of a model are compared on: strings to tokenize, rows for logits, prompts to answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tune.data.encode.arrays import IGNORED, EncodedRows
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.segments import Segment
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.paths import read_table

_MAX_TEXTS = 50
_NUM_PROMPTS = 10
_MAX_PROMPT_TOKENS = 512
# Beyond it a row is cut: the logits of 512 tokens over 262,144 pieces take 0.5 GB.
_MAX_ROW_TOKENS = 512

_TEXTS = read_table("exporting/verify/probe_texts.toml")
TRICKY_STRINGS, _BUILT_IN_TEXTS = tuple(_TEXTS["tricky"]), tuple(_TEXTS["built_in"])


@dataclass(frozen=True)
class Probe:
    """What every form is asked."""

    rows: tuple[tuple[int, ...], ...]  # token ids, the BOS first
    # of each row the indices of the tokens whose loss makes the perplexity: those that were trained
    scored: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]  # strings whose token ids must be equal
    prompts: tuple[tuple[int, ...], ...]  # token ids of prompts that are answered greedily
    stop_token_ids: tuple[int, ...]
    origin: str  # where rows and prompts come from, in words
    max_new_tokens: int = 32

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))

    def targets(self) -> list[tuple[int, int]]:
        """(position, id of the token that comes next) of each scored token, positions counted through all rows."""
        starts = np.cumsum([0, *map(len, self.rows)]).tolist()
        return [
            (start + index - 1, row[index])
            for start, row, scored in zip(starts[:-1], self.rows, self.scored, strict=True)
            for index in scored
        ]

    def positions(self) -> list[int]:
        """The positions that are compared, counted through all rows: each context once.

        The rows of a template begin alike; one near-tie there would count as many times as there are rows.
        """
        seen: set[tuple[int, ...]] = set()
        found, start = [], 0
        for row in self.rows:
            for index in range(len(row)):
                if (context := row[: index + 1]) not in seen:
                    seen.add(context)
                    found.append(start + index)
            start += len(row)
        return found


def probe_of_rows(
    rows: EncodedRows,
    examples: Sequence[Example],
    *,
    encoder: Encoder,
    num_positions: int = ExportSettings.num_positions,
) -> Probe:
    """A probe of eval rows; `examples[i]` is what `rows[i]` was made of. Without rows it is the built-in one."""
    if not len(rows):
        return built_in_probe(encoder, num_positions=num_positions)
    ids, scored = _fill(
        [(row.input_ids, [index for index, label in enumerate(row.labels) if label != IGNORED]) for row in rows],
        num_positions,
    )
    prompts = (tuple(encoder.encode_prompt(example.prompt_segments)) for example in examples)
    texts = ("".join(segment.text for segment in example.segments) for example in examples[:_MAX_TEXTS])
    return Probe(
        rows=ids,
        scored=scored,
        texts=(*TRICKY_STRINGS, *texts),
        prompts=tuple(prompt for prompt in prompts if len(prompt) <= _MAX_PROMPT_TOKENS)[:_NUM_PROMPTS],
        stop_token_ids=encoder.stop_token_ids,
        origin="eval rows",
    )


def built_in_probe(encoder: Encoder, *, num_positions: int = ExportSettings.num_positions) -> Probe:
    """A probe of plain text, for an adapter whose rows are not known."""
    rows = [encoder.encode_prompt([Segment(text, supervised=False, control=False)]) for text in _BUILT_IN_TEXTS]
    ids, scored = _fill([(row, range(1, len(row))) for row in rows], num_positions)
    return Probe(
        rows=ids,
        scored=scored,
        texts=(*TRICKY_STRINGS, *_BUILT_IN_TEXTS),
        prompts=tuple(tuple(row[: len(row) // 2 + 1]) for row in rows[:_NUM_PROMPTS]),
        stop_token_ids=encoder.stop_token_ids,
        origin="built-in text",
    )


def _fill(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], num_positions: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Ids and scored indices of the shortest rows, as many as fit, so that whole answers are among them.

    Fits counts each context once, as `Probe.positions` does; the last row is cut.
    """
    ids: list[tuple[int, ...]] = []
    scored: list[tuple[int, ...]] = []
    contexts: set[tuple[int, ...]] = set()
    for row, indices in sorted(rows, key=lambda pair: len(pair[0])):
        end = 0
        while end < min(len(row), _MAX_ROW_TOKENS) and len(contexts) < num_positions:
            end += 1
            contexts.add(tuple(row[:end]))
        if not end:
            break
        ids.append(tuple(row[:end]))
        scored.append(tuple(index for index in indices if 0 < index < end))
    return tuple(ids), tuple(scored)
