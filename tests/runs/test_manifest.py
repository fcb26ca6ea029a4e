"""What a run writes about itself."""

from __future__ import annotations

from pathlib import Path

from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest, start_manifest, update_manifest


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
