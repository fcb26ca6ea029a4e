"""A first look at rows without a recipe: their columns, and every row as a training would render it."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune.data.inputs import Inputs, open_inputs
from gemma_tune.data.look.columns import Column, describe_columns
from gemma_tune.data.look.recognise import Reading
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import read_examples, render_rows
from gemma_tune.data.rows.render import Example
from gemma_tune.data.sources.items import BrokenLine, SourceRow, stop_if_broken
from gemma_tune.data.sources.source import MAX_COLUMN_ROWS, open_source, read_whole, split_count
from gemma_tune.errors import DataError
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.schema import DataSection
from gemma_tune.text import counted

# Bytes of UTF-8 a token: fewer than the 4.2 of English prose that a plan takes as the mean, because here a row that is
# counted too short would be left out.
BYTES_PER_TOKEN = 3.5
MAX_RENDERED_ROWS = 20_000
_MAX_TOLD = 3


@dataclass(frozen=True)
class RenderedRows:
    """Rows as they would be trained: the first MAX_RENDERED_ROWS of a source, and how many there are in all."""

    num_rows: int  # that can be used; those behind the rendered ones are taken to be as good. With `#N` that number
    texts: tuple[str, ...]  # of each rendered row, prompt and response as one
    first: Example
    notes: tuple[str, ...]  # what the reading said, a sentence each

    def num_tokens(self, tokenizer: Path | None) -> tuple[int, ...]:
        """Lengths in tokens, sorted. `tokenizer`: a tokenizer.json, where there is one; else bytes are counted."""
        if tokenizer is None:
            sizes = (len(text.encode("utf-8", errors="surrogatepass")) for text in self.texts)
            return tuple(sorted(round(size / BYTES_PER_TOKEN) + 2 for size in sizes))  # <bos> and the stop token
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(tokenizer))
        encoded = backend.encode_batch_fast(list(self.texts), add_special_tokens=False)
        return tuple(sorted(len(encoding.ids) + 2 for encoding in encoded))


def read_columns(source: str, *, given: Mapping[str, Any] | None = None) -> tuple[Column, ...]:
    """Look at the columns of a source, as `data.source` names it, in its first rows; `given` as in `render_all`."""
    of_hub = {key: value for key, value in (given or {}).items() if key in ("subset", "split", "revision")}
    opened = open_source(split_count(source)[0], **of_hub)
    if not opened.columns:
        read_whole(opened)  # raises: there is not one row among the first lines
    if not opened.columns:
        raise DataError(f"{opened.label}: no row has a column", hint="rows need a question and an answer as text")
    rows = (item.fields for item in opened.rows() if isinstance(item, SourceRow))
    return describe_columns(list(itertools.islice(rows, MAX_COLUMN_ROWS)))


def render_all(source: str, reading: Reading, *, given: Mapping[str, Any]) -> RenderedRows:
    """Count the rows of a source, and render them with the reader that trains on them.

    Args:
        given: settings of a recipe's data section that the user gave.

    Raises:
        DataError: lines are broken, too many rows cannot be used, or all are equal.
    """
    values = {"source": source, "template": reading.template, "columns": dict(reading.columns)}
    section = DataSection.model_validate({**given, **values, "max_seq_tokens": 8, "eval_fraction": 0})
    inputs = open_inputs(section, prefers_chat=False)
    item = inputs.train[0]
    broken: list[BrokenLine] = []
    num_rows = 0
    for row in item.source.rows():
        num_rows += isinstance(row, SourceRow)
        broken += [row] if isinstance(row, BrokenLine) else []
    stop_if_broken(broken)
    head_item = replace(item, source=item.source.head(MAX_RENDERED_ROWS), num_rows=None)
    chat = gemma_turns() if inputs.needs_chat else None
    examples = read_examples(section, Inputs((head_item,), None), chat=chat)
    report = examples.report
    if report.train_rows > 1 and report.num_duplicates == report.train_rows - 1:
        raise DataError(
            f"{item.source.label}: {counted(report.train_rows, 'row')}, and all of them are equal",
            hint="a model learns from rows that differ",
        )
    rows = list(examples.train)
    notes = list(report.notes)
    if len(rows) > 1 and len({row.response for row in rows}) == 1:
        notes.append("every row has the same response, and a model learns to say nothing else")
    if report.rows_bad:
        notes.append(f"{counted(report.rows_bad, 'row')} cannot be used and are left out: ")
        notes[-1] += "; ".join(report.bad_samples[:_MAX_TOLD])
    texts = tuple("".join(segment.text for segment in row.segments) for row in rows)
    rendered = (example for _, example in render_rows(head_item, cleaner=None, chat=chat))
    first = next(example for example in rendered if isinstance(example, Example))
    return RenderedRows(item.num_rows or num_rows - report.rows_bad, texts, first, tuple(notes))


def gemma_turns() -> ChatRenderer:
    """Return what renders the turns of every Gemma up to 3, without loading a tokenizer."""
    template = (TINY_MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    marks = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return ChatRenderer(template, bos_token="<bos>", eos_token="<eos>", control_strings=marks)
