"""Every row of a recipe as it stands, for the audit: nothing is cleaned, dropped or left out."""

from __future__ import annotations

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import Input, Inputs
from gemma_tune.data.look.audit import AuditReport, AuditRow, audit_rows
from gemma_tune.data.open import load_encoder, open_data
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import render_rows, split_rows
from gemma_tune.data.rows.render import Example
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.recipe.schema import DataSection, Recipe
from gemma_tune.runs.reporter import Reporter


def survey_rows(
    section: DataSection, inputs: Inputs, *, encoder: Encoder, chat: ChatRenderer | None
) -> tuple[list[AuditRow], list[tuple[str, str]]]:
    """The rows on the side where training would put them, and place and problem of those that cannot be used."""
    bad: list[tuple[str, str]] = []
    rendered: list[tuple[Input, SourceRow, Example]] = []
    for item in inputs.all:
        for row, result in render_rows(item, cleaner=None, chat=chat):
            if row is not None and isinstance(result, Example):
                rendered.append((item, row, result))
            elif not isinstance(result, Example):
                bad.append((result.where, result.problem))
    if inputs.eval is None and len({example.key for _, _, example in rendered}) > 1:
        _, held_out = split_rows([[example for _, _, example in rendered]], section=section)
        eval_keys = {example.key for example in held_out}
    else:
        eval_keys = set()
    encoded = encoder.encode_rows([example.segments for _, _, example in rendered], train_on=section.train_on)
    supervised = encoded.num_supervised()
    rows = [
        AuditRow(
            where=example.where,
            side="eval" if item is inputs.eval or example.key in eval_keys else "train",
            prompt=example.prompt_text,
            response=example.response,
            key=example.key,
            texts=tuple(item.texts(row.fields)),
            category=example.category,
            num_tokens=int(encoded.lengths[index]),
            num_supervised=int(supervised[index]),
            control_strings=encoder.count_control_strings(example.segments),
        )
        for index, (item, row, example) in enumerate(rendered)
    ]
    return rows, bad


def audit_data(recipe: Recipe, *, reporter: Reporter) -> AuditReport:
    """Look at every row of a recipe as it stands, before anything is cleaned or left out."""
    base, inputs = open_data(recipe)
    _, encoder, chat = load_encoder(base, inputs=inputs)
    rows, bad = survey_rows(recipe.data, inputs, encoder=encoder, chat=chat)
    return audit_rows(
        rows,
        bad=bad,
        max_seq_tokens=recipe.data.max_seq_tokens,
        on_progress=reporter.progress,
    )
