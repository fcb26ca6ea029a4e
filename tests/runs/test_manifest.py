"""What a run writes about itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.disk import read_json, write_json
from gemma_tune.errors import RunError
from gemma_tune.identity import installed_version
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest, start_manifest, update_manifest
from gemma_tune.runs.metrics_log import append_metrics, read_metrics


def test_manifest_changes_keep_the_rest(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    started = start_manifest(run).started
    update_manifest(run, step=7, total_steps=20)
    update_manifest(run, status="failed", error="ValueError: x")
    manifest = read_manifest(run)
    assert (manifest.status, manifest.step, manifest.total_steps, manifest.error, manifest.started) == (
        "failed",
        7,
        20,
        "ValueError: x",
        started,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


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


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no lock\.json"):
        read_json(tmp_path / "lock.json")
    (tmp_path / "lock.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"lock\.json is damaged"):
        read_json(tmp_path / "lock.json")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == {"x": 1}
    with pytest.raises(RunError, match="cannot write"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_versions() -> None:
    assert installed_version("torch")
    assert installed_version("no-such-package") is None
