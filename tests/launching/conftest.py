"""A cluster of fake programs, and a recipe of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching.fake_programs import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    made = Cluster(tmp_path)
    made.add("gemma-tune", "srun", "scontrol", "scancel")
    return made


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of one's own in the working directory, with its rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    file = Path("mine.yaml")
    file.write_text("# é\nmodel:\n  name: gemma-7b\ndata:\n  source: tiny-world\n  max_seq_tokens: 64\n")
    return file
