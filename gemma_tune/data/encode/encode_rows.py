"""From rendered rows to token ids and labels, with the length policy."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol

import numpy as np

from gemma_tune.data.data_report import MAX_SAMPLES, DataReport, ReadReport
from gemma_tune.data.encode.arrays import EncodedRow, EncodedRows
from gemma_tune.data.encode.encoder import Encoder, in_batches
from gemma_tune.data.encode.lengths import length_bins, percentile
from gemma_tune.data.rows.read import Examples
from gemma_tune.data.rows.render import Example
from gemma_tune.errors import DataError
from gemma_tune.recipe.schema import DataSection
from gemma_tune.text import counted, listed

Side = Literal["train", "eval"]


@dataclass(frozen=True)
class Datasets:
    """Encoded rows; their tokens, places and examples lie on disk and are mapped."""

    train: EncodedRows
    eval: EncodedRows
    train_places: Sequence[str]  # where each train row stands in its source, such as `rows.jsonl:12`
    eval_examples: Sequence[Example]  # `eval_examples[i]` is what `eval[i]` was made of
    report: DataReport
    cached: bool = False  # whether they were read from the token cache

    @property
    def sha256(self) -> str:
        """Of everything that decides which rows are trained and how they read, the tokenizer aside."""
        return self.report.sha256


class RowSink(Protocol):
    """Takes encoded rows in their order, all train rows before the eval rows."""

    def add(self, side: Side, rows: EncodedRows, examples: Sequence[Example]) -> None:
        """Append rows without gaps between them, and what they were made of."""
        ...


def encode_examples(examples: Examples, encoder: Encoder, section: DataSection, *, into: RowSink) -> DataReport:
    """Encode the rows, batch by batch, and apply the length policy (`data.too_long`).

    Raises:
        DataError: no train row is short enough, a row is too long and the policy is to refuse, or a row does not have
            exactly one BOS and at least one supervised token.
    """
    done = _Encoded()
    both: tuple[tuple[Side, Sequence[Example]], ...] = (("train", examples.train), ("eval", examples.eval))
    counts: dict[Side, _Counts] = {}
    for side, rows in both:
        counts[side] = _encode_side(side, rows, encoder=encoder, section=section, into=into, done=done)
        if side == "train":
            _stop_if_none_is_left(counts[side], done, section)
    lengths = np.array(done.lengths, dtype=np.int64)
    if done.num_too_long and section.too_long == "refuse":
        raise DataError(
            f"{done.num_too_long:,} of {counted(len(lengths), 'row')} are longer than data.max_seq_tokens "
            f"{section.max_seq_tokens}: {listed(done.too_long, count=done.num_too_long)}",
            hint=f"set data.max_seq_tokens={done.longest}, the longest row, or data.too_long=drop",
        )
    train, held_out = counts["train"], counts["eval"]
    left_out = dict(examples.report.left_out)
    notes = list(examples.report.notes)
    if section.control_tokens == "refuse" and done.controls:
        left_out["control tokens in row text"] = len(done.controls)
    if len(examples.eval) and not held_out.rows:
        notes.append(f"every eval row is longer than max_seq_tokens {section.max_seq_tokens}: nothing is evaluated")
    controls = {} if section.control_tokens == "refuse" else done.controls
    read = {field.name: getattr(examples.report, field.name) for field in fields(ReadReport)}
    return DataReport(
        **read | {"train_rows": train.rows, "eval_rows": held_out.rows, "left_out": left_out, "notes": tuple(notes)},
        max_seq_tokens=section.max_seq_tokens,
        dropped_too_long=done.num_too_long - done.truncated,
        truncated=done.truncated,
        truncated_answers=done.truncated_answers,
        length_p50=percentile(lengths, 50),
        length_p90=percentile(lengths, 90),
        length_p99=percentile(lengths, 99),
        length_max=done.longest,
        longest_row=done.longest_row,
        length_bins=length_bins(lengths),
        train_tokens=train.tokens,
        eval_tokens=held_out.tokens,
        train_supervised_tokens=train.supervised_tokens,
        eval_supervised_tokens=held_out.supervised_tokens,
        control_strings=sum(controls.values()),
        control_as="control" if section.control_tokens == "control" else "text",
        control_samples=tuple(controls)[:MAX_SAMPLES],
        dropped_samples=tuple(done.dropped),
        sha256=examples.sha256,
    )


@dataclass
class _Counts:
    """What is kept of one side."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0


@dataclass
class _Encoded:
    """What both sides come to."""

    lengths: array[int] = field(default_factory=lambda: array("q"))  # tokens of every row before the length policy
    longest: int = 0
    longest_row: str = ""
    num_too_long: int = 0
    too_long: list[str] = field(default_factory=list)  # place and tokens of the first of them
    dropped: list[str] = field(default_factory=list)  # place and tokens of the first that are dropped for it
    truncated: int = 0
    truncated_answers: int = 0
    controls: dict[str, int] = field(default_factory=dict)  # where row text spells control tokens, and how many (S8)


def _encode_side(
    side: Side, rows: Iterable[Example], *, encoder: Encoder, section: DataSection, into: RowSink, done: _Encoded
) -> _Counts:
    counts = _Counts()
    for batch in in_batches(_with_settled_controls(rows, encoder, section, done), size=lambda row: row.num_characters):
        encoded = encoder.encode_rows([example.segments for example in batch], train_on=section.train_on)
        at = int(encoded.lengths.argmax())
        if encoded.lengths[at] > done.longest:
            done.longest, done.longest_row = int(encoded.lengths[at]), batch[at].where
        done.lengths.extend(encoded.lengths.tolist())
        encoded, kept = _fit_batch(encoded, batch, encoder=encoder, section=section, done=done)
        _check_encoded(encoded, encoder.bos_token_id, where=lambda index, rows=kept: rows[index].where)  # type: ignore[misc]
        counts.rows += len(encoded)
        counts.tokens += encoded.num_tokens
        counts.supervised_tokens += int(encoded.num_supervised().sum())
        into.add(side, encoded, kept)
    return counts


def _with_settled_controls(
    rows: Iterable[Example], encoder: Encoder, section: DataSection, done: _Encoded
) -> Iterator[Example]:
    """Apply `data.control_tokens`: such text stays text, becomes the tokens that it spells, or costs the row (S8)."""
    for example in rows:
        count = encoder.count_control_strings(example.segments)
        if count:
            done.controls[example.where] = count
            if section.control_tokens == "refuse":
                continue
            if section.control_tokens == "control":
                example = encoder.with_controls(example)
        yield example


def _fit_batch(
    encoded: EncodedRows, examples: Sequence[Example], *, encoder: Encoder, section: DataSection, done: _Encoded
) -> tuple[EncodedRows, Sequence[Example]]:
    """Drop or cut the rows that are too long."""
    too_long = np.flatnonzero(encoded.lengths > section.max_seq_tokens).tolist()
    if not too_long:
        return encoded, examples
    rows: list[EncodedRow] = []
    kept: list[Example] = []
    for index, example in enumerate(examples):
        if index not in too_long:
            rows.append(encoded[index])
            kept.append(example)
            continue
        told = f"{example.where} ({encoded.lengths[index]} tokens)"
        done.num_too_long += 1
        done.too_long += [told] * (len(done.too_long) < MAX_SAMPLES)
        cut = None if section.too_long in ("drop", "refuse") else _fit(example, encoder, section)
        if cut is None:
            done.dropped += [told] * (len(done.dropped) < MAX_SAMPLES)
            continue
        example, row, answer_cut = cut
        rows.append(row)
        kept.append(example)
        done.truncated += 1
        done.truncated_answers += answer_cut
    return EncodedRows.from_rows(rows), kept


def _stop_if_none_is_left(train: _Counts, done: _Encoded, section: DataSection) -> None:
    if train.rows or (done.num_too_long and section.too_long == "refuse"):
        return
    if not done.lengths:
        raise DataError(
            f"all train rows spell control tokens in their text: {listed(list(done.controls))}",
            hint="set data.control_tokens=text to encode them as text, or control to encode them as tokens",
        )
    lengths = np.array(done.lengths, dtype=np.int64)
    raise DataError(
        f"all {len(lengths):,} train rows are longer than data.max_seq_tokens {section.max_seq_tokens}: "
        f"they have {lengths.min()} to {lengths.max()} tokens",
        hint=f"set data.max_seq_tokens={percentile(lengths, 99)} to keep 99 % of them",
    )


def _check_encoded(rows: EncodedRows, bos_token_id: int, *, where: Callable[[int], str]) -> None:
    """One BOS, at position 0, outside the loss; at least one token in the loss (F11, F12, F18)."""
    if not len(rows):
        return
    is_bos = np.concatenate([[0], np.cumsum(rows.token_ids == bos_token_id)])
    num_bos = is_bos[rows.starts + rows.lengths] - is_bos[rows.starts]
    wrong = np.flatnonzero(
        (rows.token_ids[rows.starts] != bos_token_id)
        | (num_bos != 1)
        | rows.supervised[rows.starts]
        | (rows.num_supervised() == 0)
    )
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{where(first)}: encoded with {num_bos[first]} BOS tokens and {rows.num_supervised()[first]} tokens in "
            "the loss; a row has one BOS, at its start, and at least its stop token in the loss "
            f"({counted(len(wrong), 'such row')})",
            hint="check the data template and the model's tokenizer",
        )


def _fit(example: Example, encoder: Encoder, section: DataSection) -> tuple[Example, EncodedRow, bool] | None:
    """Cut row text until the row fits: example, encoded row and whether the answer was cut; None if it never fits.

    The prompt first: its longest piece, from the left. Then, with `too_long: truncate`, the last answer, from the
    right.
    """
    segments, answer_cut = list(example.segments), False
    while True:
        row = encoder.encode(segments, train_on=section.train_on)
        excess = len(row.input_ids) - section.max_seq_tokens
        if excess <= 0:
            return replace(example, segments=tuple(segments)), row, answer_cut
        prompts = [index for index, segment in enumerate(segments) if segment.text and segment.is_row_prompt]
        answers = [
            index
            for index, segment in enumerate(segments)
            if segment.text and segment.supervised and not segment.control
        ]
        if prompts:
            at = max(prompts, key=lambda index: len(segments[index].text))
            text = _without_first_tokens(segments[at].text, excess, encoder)
        elif section.too_long == "truncate" and answers:
            at, answer_cut = answers[-1], True
            text = _without_last_tokens(segments[at].text, excess, encoder)
            if not text.strip():
                return None
        else:
            return None
        segments[at] = replace(segments[at], text=text)


def _without_first_tokens(text: str, count: int, encoder: Encoder) -> str:
    offsets = encoder.offsets(text)
    # At least one character goes, so that cutting always ends.
    return text[max(offsets[count][0], 1) :] if count < len(offsets) else ""


def _without_last_tokens(text: str, count: int, encoder: Encoder) -> str:
    offsets = encoder.offsets(text)
    return text[: min(offsets[-count][0], len(text) - 1)] if count < len(offsets) else ""
