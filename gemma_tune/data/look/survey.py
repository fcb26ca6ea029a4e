"""Every row of a recipe as it stands, for the audit: nothing is cleaned, dropped or left out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemma_tune.data.encode.encoder import Encoder, in_batches
from gemma_tune.data.inputs import Input, Inputs
from gemma_tune.data.look.audit import AuditReport, audit_rows
from gemma_tune.data.look.findings import AuditRow
from gemma_tune.data.open import load_encoder, open_data
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.divide import KEY_BYTES, RowKeys
from gemma_tune.data.rows.read import render_rows
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.spool import Spool
from gemma_tune.data.rows.unread import Tally, unread_notes
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.recipe.schema import DataSection, Recipe
from gemma_tune.runs.reporter import Reporter


def survey_rows(
    section: DataSection, inputs: Inputs, *, encoder: Encoder, chat: ChatRenderer | None
) -> tuple[Sequence[AuditRow], Sequence[tuple[str, str]], tuple[str, ...]]:
    """Read rows on the side where training would put them, and place and problem of unusable ones; both on disk.

    The third part says what of the rows is not read.
    """
    tallies = [(item.source.label, Tally()) for item in inputs.all]
    keys = bytearray()
    eval_keys: set[bytes] = set()  # of the rows that are held out, which is known when all have been read

    def to_json(row: AuditRow) -> tuple[Any, ...]:
        counts = (row.num_tokens, row.num_supervised, row.control_strings)
        return (row.where, row.side, row.response, row.key.hex(), row.texts, row.learned, row.category, *counts)

    def from_json(values: Sequence[Any]) -> AuditRow:
        where, side, response, digits, texts, *others = values
        key, texts = bytes.fromhex(digits), tuple(map(tuple, texts))
        return AuditRow(where, "eval" if key in eval_keys else side, response, key, texts, *others)

    rows = Spool(encode=to_json, decode=from_json)
    bad: Spool[tuple[str, str]] = Spool(decode=tuple)
    for item, (_, tally) in zip(inputs.all, tallies, strict=True):
        rendered = _render(item, chat=chat, bad=bad, tally=tally)
        for batch in in_batches(rendered, size=lambda pair: pair[1].num_characters):
            encoded = encoder.encode_rows([example.segments for _, example in batch], train_on=section.train_on)
            numbers = zip(encoded.lengths.tolist(), encoded.num_supervised().tolist(), strict=True)
            for (row, example), (num_tokens, num_supervised) in zip(batch, numbers, strict=True):
                keys += example.key
                texts = tuple(item.texts(row.fields))
                answers = [part.text for part in example.segments if part.supervised and not part.control]
                rows.append(
                    AuditRow(
                        where=example.where,
                        side="eval" if item is inputs.eval else "train",
                        response=example.response,
                        key=example.key,
                        texts=texts,
                        learned=tuple(any(text.strip() in answer for answer in answers) for _, text in texts),
                        category=example.category,
                        num_tokens=num_tokens,
                        num_supervised=num_supervised,
                        control_strings=encoder.count_control_strings(example.segments),
                    )
                )
    if inputs.eval is None:
        decided = RowKeys.of(keys, seed=section.seed)
        if len(np.unique(decided.numbers)) > 1:
            held_out = np.flatnonzero(decided.held_out(fraction=section.eval_fraction)).tolist()
            eval_keys.update(bytes(keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]) for at in held_out)
    return rows, bad, tuple(unread_notes(tallies, section.drop_fields))


def _render(
    item: Input, *, chat: ChatRenderer | None, bad: Spool[tuple[str, str]], tally: Tally
) -> Iterator[tuple[SourceRow, Example]]:
    for row, result in render_rows(item, cleaner=None, chat=chat, tally=tally):
        if row is not None and isinstance(result, Example):
            yield row, result
        elif not isinstance(result, Example):
            bad.append((result.where, result.problem))


def audit_data(recipe: Recipe, *, reporter: Reporter) -> AuditReport:
    """Look at every row of a recipe as it stands, before anything is cleaned or left out."""
    base, inputs = open_data(recipe)
    _, encoder, chat = load_encoder(base, inputs=inputs)
    rows, bad, notes = survey_rows(recipe.data, inputs, encoder=encoder, chat=chat)
    report = audit_rows(rows, bad=bad, max_seq_tokens=recipe.data.max_seq_tokens, on_progress=reporter.progress)
    return replace(report, notes=notes)
