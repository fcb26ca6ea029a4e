"""The lines of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.metrics_log import append_metrics, read_metrics


def test_metrics_are_json_even_when_a_number_is_not_finite(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_metrics(run, {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "tokens": 3})
    assert json.loads(run.metrics.read_text(encoding="utf-8")) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "tokens": 3,
    }


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_metrics(run, {"step": 1})
    with run.metrics.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 2, "lo')
    assert read_metrics(run) == [{"step": 1}]
    assert read_metrics(RunDir(tmp_path / "none")) == []
