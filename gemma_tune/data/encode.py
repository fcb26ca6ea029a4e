"""From rendered rows to token ids and labels, with the length policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from gemma_tune.data.encoded import EncodedRow, EncodedRows, Ints
from gemma_tune.data.read import Examples
from gemma_tune.data.render import Example
from gemma_tune.data.report import MAX_SAMPLES, DataReport, ReadReport, counted, listed
from gemma_tune.data.tokenize import Encoder
from gemma_tune.errors import DataError
from gemma_tune.recipe.schema import DataSection


@dataclass(frozen=True)
class Datasets:
    """Encoded rows.

    Attributes:
        train, eval: token ids and what of them is in the loss.
        train_places: where each train row stands in its source, such as `rows.jsonl:12`.
        eval_examples: `eval_examples[i]` is what `eval[i]` was made of.
        report: counts.
        cached: whether they were read from the token cache.
    """

    train: EncodedRows
    eval: EncodedRows
    train_places: tuple[str, ...]
    eval_examples: tuple[Example, ...]
    report: DataReport
    cached: bool = False

    @property
    def sha256(self) -> str:
        """Of everything that decides which rows are trained and how they read, the tokenizer aside."""
        return self.report.sha256


def encode_examples(examples: Examples, encoder: Encoder, section: DataSection) -> Datasets:
    """Encode the rows and apply the length policy (`data.too_long`).

    Raises:
        DataError: no train row is short enough, a row is too long and the policy is to refuse, or a row does not have
            exactly one BOS and at least one supervised token.
    """
    examples, controls = _settle_controls(examples, encoder, section)
    both = [*examples.train, *examples.eval]
    encoded = encoder.encode_rows([example.segments for example in both], train_on=section.train_on)
    lengths = encoded.lengths
    limit = section.max_seq_tokens
    too_long = np.flatnonzero(lengths > limit).tolist()
    if too_long and section.too_long == "refuse":
        raise DataError(
            f"{len(too_long):,} of {len(both):,} rows are longer than data.max_seq_tokens {limit}: "
            + listed(_told_lengths(both, lengths, too_long), len(too_long)),
            hint=f"set data.max_seq_tokens={lengths.max()}, the longest row, or data.too_long=drop",
        )
    fitted = {} if section.too_long == "drop" else _fit_all(both, too_long, encoder, section)
    all_rows = EncodedRows.join([encoded, EncodedRows.from_rows(row for _, row, _ in fitted.values())])
    replaced = dict(zip(fitted, range(len(both), len(all_rows)), strict=True))
    dropped = [index for index in too_long if index not in replaced]
    kept = [index for index in range(len(both)) if index not in set(dropped)]
    in_train = [index for index in kept if index < len(examples.train)]
    in_eval = [index for index in kept if index >= len(examples.train)]
    if not in_train:
        raise DataError(
            f"all {len(examples.train):,} train rows are longer than data.max_seq_tokens {limit}: "
            f"they have {lengths.min()} to {lengths.max()} tokens",
            hint=f"set data.max_seq_tokens={_percentile(lengths, 99)} to keep 99 % of them",
        )
    train = all_rows.take([replaced.get(index, index) for index in in_train])
    held_out = all_rows.take([replaced.get(index, index) for index in in_eval])
    for rows, indices in ((train, in_train), (held_out, in_eval)):
        _check_encoded(rows, encoder.bos_token_id, where=lambda index, at=indices: both[at[index]].where)  # type: ignore[misc]
    notes = list(examples.report.notes)
    if examples.eval and not in_eval:
        notes.append(f"every eval row is longer than max_seq_tokens {limit}: nothing is evaluated")
    read = {field.name: getattr(examples.report, field.name) for field in fields(ReadReport)}
    report = DataReport(
        **read | {"train_rows": len(train), "eval_rows": len(held_out), "notes": tuple(notes)},
        max_seq_tokens=limit,
        dropped_too_long=len(dropped),
        truncated=len(fitted),
        truncated_answers=sum(answer_cut for _, _, answer_cut in fitted.values()),
        length_p50=_percentile(lengths, 50),
        length_p90=_percentile(lengths, 90),
        length_p99=_percentile(lengths, 99),
        length_max=int(lengths.max()),
        longest_row=both[int(lengths.argmax())].where,
        train_tokens=train.num_tokens,
        eval_tokens=held_out.num_tokens,
        train_supervised_tokens=int(train.num_supervised().sum()),
        eval_supervised_tokens=int(held_out.num_supervised().sum()),
        control_strings=sum(count for _, count in controls),
        control_as="control" if section.control_tokens == "control" else "text",
        control_samples=tuple(where for where, _ in controls[:MAX_SAMPLES]),
        dropped_samples=tuple(_told_lengths(both, lengths, dropped)),
        sha256=examples.sha256,
    )
    return Datasets(
        train=train,
        eval=held_out,
        train_places=tuple(both[index].where for index in in_train),
        eval_examples=tuple(fitted[index][0] if index in fitted else both[index] for index in in_eval),
        report=report,
    )


def _settle_controls(
    examples: Examples, encoder: Encoder, section: DataSection
) -> tuple[Examples, list[tuple[str, int]]]:
    """Apply `data.control_tokens` (S8); also returns where row text spells control tokens, and how many."""
    counts = {
        id(example): count
        for example in (*examples.train, *examples.eval)
        if (count := encoder.count_control_strings(example.segments))
    }
    found = {
        example.where: counts[id(example)] for example in (*examples.train, *examples.eval) if id(example) in counts
    }
    if not found or section.control_tokens == "text":
        return examples, list(found.items())
    if section.control_tokens == "control":
        sides = [
            [encoder.with_controls(example) if id(example) in counts else example for example in side]
            for side in (examples.train, examples.eval)
        ]
        return replace(examples, train=sides[0], eval=sides[1]), list(found.items())
    sides = [[example for example in side if id(example) not in counts] for side in (examples.train, examples.eval)]
    left_out = examples.report.left_out | {"control tokens in row text": len(found)}
    if not sides[0]:
        raise DataError(
            f"all train rows spell control tokens in their text: {listed(list(found), len(found))}",
            hint="set data.control_tokens=text to encode them as text, or control to encode them as tokens",
        )
    return replace(examples, train=sides[0], eval=sides[1], report=replace(examples.report, left_out=left_out)), []


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


_Fitted = tuple[Example, EncodedRow, bool]


def _fit_all(
    examples: Sequence[Example], indices: Sequence[int], encoder: Encoder, section: DataSection
) -> dict[int, _Fitted]:
    """The rows at `indices` that could be cut to fit: example, encoded row, whether the answer was cut."""
    fitted: dict[int, _Fitted] = {}
    for index in indices:
        cut = _fit(examples[index], encoder, section, answer=False)
        if cut is None and section.too_long == "truncate":
            cut = _fit(examples[index], encoder, section, answer=True)
            if cut is not None:
                fitted[index] = (*cut, True)
        elif cut is not None:
            fitted[index] = (*cut, False)
    return fitted


def _fit(
    example: Example, encoder: Encoder, section: DataSection, *, answer: bool
) -> tuple[Example, EncodedRow] | None:
    """Cut row text until the row fits, None if it never does.

    The prompt first: its longest piece, from the left. Then, with `answer`, the last answer, from the right.
    """
    segments = list(example.segments)
    while True:
        row = encoder.encode(segments, train_on=section.train_on)
        excess = len(row.input_ids) - section.max_seq_tokens
        if excess <= 0:
            return replace(example, segments=tuple(segments)), row
        prompts = [index for index, segment in enumerate(segments) if segment.text and segment.is_row_prompt]
        answers = [
            index
            for index, segment in enumerate(segments)
            if segment.text and segment.supervised and not segment.control
        ]
        if prompts:
            at = max(prompts, key=lambda index: len(segments[index].text))
            text = _without_first_tokens(segments[at].text, excess, encoder)
        elif answer and answers:
            at = answers[-1]
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


def _percentile(lengths: Ints, percent: int) -> int:
    """The smallest value that at least `percent` % of the values do not exceed."""
    return int(np.percentile(lengths, percent, method="inverted_cdf"))


def _told_lengths(examples: Sequence[Example], lengths: Ints, indices: Sequence[int]) -> list[str]:
    return [f"{examples[index].where} ({lengths[index]} tokens)" for index in indices[:MAX_SAMPLES]]
