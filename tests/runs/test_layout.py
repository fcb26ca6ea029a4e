"""A run directory is opened by its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.errors import RunError
from gemma_tune.runs.layout import open_run
from gemma_tune.runs.manifest import start_manifest
from gemma_tune.runs.open_run import create_run


def test_opening(tmp_path: Path) -> None:
    run = create_run(tmp_path, name="good", recipe_name="r", needed_bytes=0)
    with pytest.raises(RunError, match=r"not a run directory: it has no manifest\.json"):
        open_run(run.path)
    start_manifest(run)
    assert open_run(run.path) == run
    with pytest.raises(RunError, match="no such run") as caught:
        open_run(tmp_path / "bad")
    assert str(run.path) in (caught.value.hint or "")
