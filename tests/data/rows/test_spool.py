"""Values and examples on disk; and that a set of rows is never whole in memory."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_tune.data.encode import cache
from gemma_tune.data.encode import encoder as tokenize
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import build_datasets
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.segments import Segment
from gemma_tune.data.rows.spool import Chosen, ExampleSpool, Lines, LineWriter
from gemma_tune.errors import DataError
from gemma_tune.paths import CACHE_VARIABLE
from gemma_tune.recipe.schema import DataSection


def example(number: int) -> Example:
    segments = (
        Segment(f"line 1\nline 2 {number}\u2028é\U0001f600", supervised=False, control=False),
        Segment("an answer", supervised=True, control=False),
        Segment("", supervised=True, control=True, stop=True),
    )
    return Example(f"rows.jsonl:{number}", segments, "a question", "an answer", None, bytes([number, 255]))


@pytest.mark.parametrize("values", [[], ["", "a\nb", "\u2028", 'quote "', "\x00"], [[1, None, True]]])
def test_lines_give_back_what_was_written(tmp_path: Path, values: list[Any]) -> None:
    with (tmp_path / "lines").open("w+b") as file:
        writer = LineWriter(file)
        for value in values:
            writer.append(value)
        file.flush()
        lines = Lines(file, writer.starts, decode=lambda value: value)
    (tmp_path / "lines").unlink()
    assert list(lines) == values and len(lines) == len(values)
    assert lines[:] == values and lines[1:3] == values[1:3]
    if values:
        assert lines[-1] == values[-1]
    with pytest.raises(IndexError):
        lines[len(values)]


def test_examples_come_back_equal_and_in_any_order(tmp_path: Path) -> None:
    spool = ExampleSpool(tmp_path)
    assert not list(tmp_path.iterdir())  # no name that somebody else could read, nothing to clean up
    for number in range(5):
        spool.append(example(number))
    assert spool[4] == example(4)
    spool.append(example(5))  # after something was read
    assert spool.keys == b"".join(example(number).key for number in range(6))
    rows = Chosen(spool, np.array([5, 0, 5]))
    assert list(rows) == rows[:] == [example(5), example(0), example(5)]


def build(path: Path, tokenizer: Any, **settings: Any) -> Any:
    section = DataSection(**{"source": str(path), "template": "dolly", "max_seq_tokens": 1_000_000} | settings)
    inputs = open_inputs(section, prefers_chat=False)
    return build_datasets(section, inputs, Encoder(tokenizer), chat=None, tokenizer_files={})


def write_rows(path: Path, *, count: int, characters: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"{number} blue " * (characters // len(f"{number} blue "))
            file.write(json.dumps({"instruction": f"What is {number}?", "response": text}) + "\n")


def test_rows_are_not_held_in_memory(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times the rows, 2 MB and 10 MB of text: the same memory."""
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 20_000)
    peaks = []
    for count in (4, 100, 500):
        path = tmp_path / f"{count}.jsonl"
        write_rows(path, count=count, characters=20_000)
        tracemalloc.start()
        made = build(path, tokenizer, eval_fraction=0.2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(made.train) + len(made.eval) == count
        assert made.train.num_tokens + made.eval.num_tokens > count * 10_000
        assert made.eval_examples and all(len(row.response) > 10_000 for row in made.eval_examples)
        assert build(path, tokenizer, eval_fraction=0.2).cached
    assert peaks[2] < peaks[1] + 400 * 1_000  # of the 20,000 characters and more of a row


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache.EntryWriter, "add", full)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"instruction": "a?", "response": "b"}\n{"instruction": "c?", "response": "d"}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"no space is left for the encoded rows in .*cache/tokens") as caught:
        build(path, tokenizer)
    assert caught.value.hint is not None and CACHE_VARIABLE in caught.value.hint
    assert not list((tmp_path / "cache" / "tokens").iterdir())
