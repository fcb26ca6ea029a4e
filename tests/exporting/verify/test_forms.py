"""A form in a process of its own gives what it gives here; what goes wrong there is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_tune.errors import ExportError
from gemma_tune.exporting.verify.forms import PLAIN, Form, measure_here, measure_in_child
from gemma_tune.exporting.verify.probe_texts import Probe
from gemma_tune.paths import TINY_MODEL_DIR

PROBE = Probe(((2, 5, 17), (2, 9)), ((1, 2), (1,)), ("a  b\n",), ((2, 5),), (1,), "test rows", max_new_tokens=4)


def test_a_child_measures_what_this_process_does(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(TINY_MODEL_DIR)
    asked = [
        Form("base", PLAIN, TINY_MODEL_DIR, tokenizer=TINY_MODEL_DIR),
        Form("adapted", PLAIN, TINY_MODEL_DIR, adapter=adapter, tokenizer=TINY_MODEL_DIR),
    ]
    (tmp_path / "here").mkdir()
    told: list[tuple[int, int]] = []
    here = measure_here(asked, PROBE, directory=tmp_path / "here")
    child = measure_in_child(asked, PROBE, directory=tmp_path, on_progress=lambda *step: told.append(step))
    for mine, theirs in zip(here, child, strict=True):
        assert (theirs.form, theirs.text_ids, theirs.answers) == (mine.form, mine.text_ids, mine.answers)
        assert np.abs(mine.logits - theirs.logits).max() < 1e-4
    assert np.abs(here[0].logits - here[1].logits).max() > 1e-2
    assert told == [(step, 6) for step in range(1, 7)]


def test_an_error_of_the_child_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nowhere: has no config\.json"):
        measure_in_child(
            [Form("gone", PLAIN, tmp_path / "nowhere", tokenizer=TINY_MODEL_DIR)], PROBE, directory=tmp_path
        )


def test_an_abort_of_llama_cpp_is_told(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + os.urandom(400))
    with pytest.raises(ExportError, match="the process that ran broken ended with"):
        measure_in_child(
            [Form("broken", "gemma_tune.exporting.verify.gguf_form:open_gguf", tmp_path / "broken.gguf")],
            PROBE,
            directory=tmp_path,
        )


def test_a_killed_child_is_told_as_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("import os\nos.kill(os.getpid(), 9)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ExportError, match="big was killed, most likely for want of memory") as caught:
        measure_in_child([Form("big", PLAIN, Path("big"))], PROBE, directory=tmp_path)
    assert "--skip-verify" in (caught.value.hint or "")
