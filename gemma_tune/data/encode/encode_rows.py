"""From rendered rows to token ids and labels, with the length policy."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal

import numpy as np

from gemma_tune.data.data_report import MAX_SAMPLES, DataReport, ReadReport
from gemma_tune.data.encode.arrays import EncodedRow, EncodedRows, length_bins, percentile
from gemma_tune.data.encode.encoder import Encoder, in_batches
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


def encode_examples(
    examples: Examples,
    encoder: Encoder,
    section: DataSection,
    *,
    add: Callable[[Side, EncodedRows, Sequence[Example]], None],
) -> DataReport:
    """Encode the rows, batch by batch, and apply the length policy (`data.too_long`).

    Args:
        add: takes rows without gaps between them and what they were made of; all train rows before the eval rows.

    Raises:
        DataError: no train row is short enough, a row is too long and the policy is to refuse, or a row does not have
            exactly one BOS and at least one supervised token.
    """
    done = _SectionEncoder(encoder, section)
    train = done.encode_side(examples.train, add=partial(add, "train"))
    done.stop_if_none_is_left(train)
    held_out = done.encode_side(examples.eval, add=partial(add, "eval"))
    lengths = np.array(done.lengths, dtype=np.int64)
    if done.num_too_long and section.too_long == "refuse":
        raise DataError(
            f"{done.num_too_long:,} of {counted(len(lengths), 'row')} are longer than data.max_seq_tokens "
            f"{section.max_seq_tokens}: {listed(done.too_long, count=done.num_too_long)}",
            hint=f"set data.max_seq_tokens={done.longest}, the longest row, or data.too_long=drop",
        )
    left_out, controls = dict(examples.report.left_out), done.controls
    notes = examples.report.notes
    if section.control_tokens == "refuse" and controls:
        left_out["control tokens in row text"], controls = len(controls), {}
    if len(examples.eval) and not held_out.rows:
        notes += (f"every eval row is longer than max_seq_tokens {section.max_seq_tokens}: nothing is evaluated",)
    read = {field.name: getattr(examples.report, field.name) for field in fields(ReadReport)}
    return DataReport(
        **read | {"train_rows": train.rows, "eval_rows": held_out.rows, "left_out": left_out, "notes": notes},
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
class _SectionEncoder:
    """Encodes both sides as a section says, and counts what they come to."""

    encoder: Encoder
    section: DataSection
    lengths: array[int] = field(default_factory=lambda: array("q"))  # tokens of every row before the length policy
    longest: int = 0
    longest_row: str = ""
    num_too_long: int = 0
    too_long: list[str] = field(default_factory=list)  # place and tokens of the first of them
    dropped: list[str] = field(default_factory=list)  # place and tokens of the first that are dropped for it
    truncated: int = 0
    truncated_answers: int = 0
    controls: dict[str, int] = field(default_factory=dict)  # where row text spells control tokens, and how many (S8)

    def encode_side(self, rows: Iterable[Example], *, add: Callable[[EncodedRows, Sequence[Example]], None]) -> _Counts:
        counts = _Counts()
        for batch in in_batches(self._with_settled_controls(rows), size=lambda row: row.num_characters):
            encoded = self.encoder.encode_rows([row.segments for row in batch], train_on=self.section.train_on)
            at = int(encoded.lengths.argmax())
            if encoded.lengths[at] > self.longest:
                self.longest, self.longest_row = int(encoded.lengths[at]), batch[at].where
            self.lengths.extend(encoded.lengths.tolist())
            encoded, kept = self._fit_batch(encoded, batch)
            _check_encoded(encoded, kept, self.encoder.bos_token_id)
            counts.rows += len(encoded)
            counts.tokens += encoded.num_tokens
            counts.supervised_tokens += int(encoded.num_supervised().sum())
            add(encoded, kept)
        return counts

    def stop_if_none_is_left(self, train: _Counts) -> None:
        if train.rows or (self.num_too_long and self.section.too_long == "refuse"):
            return
        if not self.lengths:
            raise DataError(
                f"all train rows spell control tokens in their text: {listed(list(self.controls))}",
                hint="set data.control_tokens=text to encode them as text, or control to encode them as tokens",
            )
        lengths = np.array(self.lengths, dtype=np.int64)
        raise DataError(
            f"all {len(lengths):,} train rows are longer than data.max_seq_tokens {self.section.max_seq_tokens}: "
            f"they have {lengths.min()} to {lengths.max()} tokens",
            hint=f"set data.max_seq_tokens={percentile(lengths, 99)} to keep 99 % of them",
        )

    def _with_settled_controls(self, rows: Iterable[Example]) -> Iterator[Example]:
        """Apply `data.control_tokens`: the text stays, becomes the tokens that it spells, or costs the row (S8)."""
        for example in rows:
            count = self.encoder.count_control_strings(example.segments)
            if count:
                self.controls[example.where] = count
                if self.section.control_tokens == "refuse":
                    continue
                if self.section.control_tokens == "control":
                    example = self.encoder.with_controls(example)
            yield example

    def _fit_batch(self, encoded: EncodedRows, examples: Sequence[Example]) -> tuple[EncodedRows, Sequence[Example]]:
        """Drop or cut the rows that are too long."""
        too_long = set(np.flatnonzero(encoded.lengths > self.section.max_seq_tokens).tolist())
        if not too_long:
            return encoded, examples
        rows: list[EncodedRow] = []
        kept: list[Example] = []
        for index, example in enumerate(examples):
            row = encoded[index]
            if index in too_long:
                told = f"{example.where} ({encoded.lengths[index]} tokens)"
                self.num_too_long += 1
                self.too_long += [told] * (len(self.too_long) < MAX_SAMPLES)
                cut = None if self.section.too_long in ("drop", "refuse") else self._fit(example)
                if cut is None:
                    self.dropped += [told] * (len(self.dropped) < MAX_SAMPLES)
                    continue
                example, row, answer_cut = cut
                self.truncated += 1
                self.truncated_answers += answer_cut
            rows.append(row)
            kept.append(example)
        return EncodedRows.from_rows(rows), kept

    def _fit(self, example: Example) -> tuple[Example, EncodedRow, bool] | None:
        """Cut row text until the row fits: example, encoded row and whether the answer was cut; None if it never fits.

        The prompt first: its longest piece, from the left. Then, with `too_long: truncate`, the last answer, from the
        right.
        """
        segments, answer_cut = list(example.segments), False
        while True:
            row = self.encoder.encode(segments, train_on=self.section.train_on)
            excess = len(row.input_ids) - self.section.max_seq_tokens
            if excess <= 0:
                return replace(example, segments=tuple(segments)), row, answer_cut
            own = [index for index, segment in enumerate(segments) if segment.text and not segment.control]
            prompts = [index for index in own if not segments[index].supervised]
            if prompts:
                at = max(prompts, key=lambda index: len(segments[index].text))
            elif self.section.too_long == "truncate" and own:
                at, answer_cut = own[-1], True
            else:
                return None
            text = segments[at].text
            offsets = self.encoder.offsets(text)
            # At least one character goes, so that cutting always ends.
            if excess >= len(offsets):
                text = ""
            elif answer_cut:
                text = text[: min(offsets[-excess][0], len(text) - 1)]
            else:
                text = text[max(offsets[excess][0], 1) :]
            if answer_cut and not text.strip():
                return None
            segments[at] = replace(segments[at], text=text)


def _check_encoded(rows: EncodedRows, examples: Sequence[Example], bos_token_id: int) -> None:
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
            f"{examples[first].where}: encoded with {num_bos[first]} BOS tokens and {rows.num_supervised()[first]} "
            "tokens in the loss; a row has one BOS, at its start, and at least its stop token in the loss "
            f"({counted(len(wrong), 'such row')})",
            hint="check the data template and the model's tokenizer",
        )
