"""Which rows a run is evaluated on: those it held out, or those of a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.data.encode.arrays import EncodedRows
from gemma_tune.data.encode.cache import cache_key
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import build_datasets
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.render import Example, render_example
from gemma_tune.data.rows.segments import RowError
from gemma_tune.data.rows.template import DataTemplate
from gemma_tune.data.rows.unread import RowFormat
from gemma_tune.data.sources.items import told
from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.errors import DataError
from gemma_tune.models.fetch import LocalModel
from gemma_tune.models.safetensors import tokenizer_hashes
from gemma_tune.recipe.schema import DataSection


@dataclass(frozen=True)
class EvalRows:
    """Encoded rows; `examples[i]` is what `encoded[i]` was made of."""

    encoded: EncodedRows
    examples: Sequence[Example]

    def first(self, count: int | None) -> EvalRows:
        """The first rows, or all of them."""
        return EvalRows(self.encoded[:count], self.examples[:count])


@dataclass(frozen=True)
class FoundRows:
    """Rows that are there, before a tokenizer is loaded."""

    label: str  # where they come from
    key: str  # a hash of everything that decides them
    load: Callable[[Any, Encoder], EvalRows]  # encodes them


def held_out_rows(section: DataSection, *, base: LocalModel, trained_sha256: str) -> FoundRows:
    """The rows that a run held out.

    Args:
        section: the run's own data section.
        trained_sha256: of the rows, as the run's lock has it. Other rows are divided otherwise, so that what is now
            held out may have been trained.

    Raises:
        DataError: a source is gone; when they are loaded, the rows are not those of the run, or none were held out.
    """
    inputs = open_inputs(section, prefers_chat=base.knows_chat_turns)
    tokenizer_files = tokenizer_hashes(base.directory)
    hint = "evaluate on rows of a file with --source FILE"

    def load(tokenizer: Any, encoder: Encoder) -> EvalRows:
        chat = ChatRenderer.from_tokenizer(tokenizer) if inputs.needs_chat else None
        datasets = build_datasets(section, inputs, encoder, chat=chat, tokenizer_files=tokenizer_files)
        if datasets.sha256 != trained_sha256:
            raise DataError(
                "the rows of this run have changed since it was trained, so that held-out rows may be trained ones",
                hint=f"restore them, or {hint}",
            )
        if not len(datasets.eval):
            raise DataError("this run held no rows out", hint=hint)
        return EvalRows(datasets.eval, datasets.eval_examples)

    source = inputs.eval.source if inputs.eval else None
    label = source.label if source else " + ".join(item.source.label for item in inputs.train) + ", held out"
    return FoundRows(label, cache_key(section, inputs, tokenizer_files=tokenizer_files), load)


def rows_of_source(name: str, *, template: DataTemplate, section: DataSection) -> FoundRows:
    """All rows of a file (or of any other source), read with the run's template and columns.

    Raises:
        DataError: there is no such source; when they are loaded, a row of it cannot be used: figures over fewer rows
            than the file has would be read as figures over the file.
    """
    source = open_source(name)

    def load(tokenizer: Any, encoder: Encoder) -> EvalRows:
        chat = ChatRenderer.from_tokenizer(tokenizer) if template.needs_chat else None
        examples, problems, row_format = [], [], RowFormat.of(section)
        for row in read_whole(source):
            try:
                examples.append(render_example(template, row, chat=chat, row_format=row_format))
            except RowError as error:
                problems.append(str(error))
        if problems:
            raise DataError(
                f"{source.label}: {len(problems):,} of {len(problems) + len(examples):,} rows cannot be used with the "
                f"run's template {template.name}\n{told(problems)}",
                hint="fix them, or leave them out of the file",
            )
        return EvalRows(encoder.encode_rows([e.segments for e in examples], train_on=section.train_on), examples)

    return FoundRows(source.label, source.sha256, load)
