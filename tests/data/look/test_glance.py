"""What `init` measures of rows: their columns, how many there are and how long they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.look.glance import MAX_RENDERED_ROWS, RenderedRows, read_columns, render_all
from gemma_tune.data.look.recognise import Reading
from gemma_tune.data.open import load_encoder
from gemma_tune.data.rows.read import read_examples
from gemma_tune.errors import DataError
from gemma_tune.models.fetch import fetch_model
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.schema import DataSection


def render(source: str, template: str) -> RenderedRows:
    return render_all(source, Reading("instruct", template, {}), given={})


def test_columns_of_the_first_rows() -> None:
    names = [column.name for column in read_columns("tiny-world#5")]
    assert names == ["instruction", "context", "response", "category"]


@pytest.mark.parametrize("template", ["dolly", "dolly-chat"])
def test_lengths_are_those_of_the_training(template: str) -> None:
    rows = render("tiny-world", template)
    section = DataSection(source="tiny-world", template=template, max_seq_tokens=4096, eval_fraction=0)
    inputs = open_inputs(section, prefers_chat=False)
    _, encoder, chat = load_encoder(fetch_model("gemma-tiny"), inputs=inputs)
    examples = read_examples(section, inputs, chat=chat)
    encoded = encoder.encode_rows([row.segments for row in examples.train], train_on="response")
    assert rows.num_rows == len(examples.train)
    lengths = rows.num_tokens(TINY_MODEL_DIR / "tokenizer.json")
    # Segments that are cut one by one may have a token more or less at a border than the text as a whole.
    pairs = zip(lengths, sorted(encoded.lengths.tolist()), strict=True)
    assert max(abs(measured - trained) for measured, trained in pairs) <= 2


def test_without_a_tokenizer_bytes_are_counted_and_every_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"{index:04} abc" if index else "ä" * 350}) for index in range(MAX_RENDERED_ROWS + 7)]
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = render(str(path), "text")
    assert rows.num_rows == MAX_RENDERED_ROWS + 7
    lengths = rows.num_tokens(None)
    assert len(lengths) == MAX_RENDERED_ROWS
    assert (lengths[0], lengths[-1]) == (2 + 2, 200 + 2)
    only_null = tmp_path / "empty.jsonl"
    only_null.write_text('{"text": null}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"1 of 1 row of empty.jsonl cannot be used"):
        render(str(only_null), "text")


def test_a_broken_line_behind_the_rendered_rows_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "abc"}\n' * 3 + '{"text"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:4"):
        render(str(path), "text")
