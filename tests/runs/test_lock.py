"""lock.json of other versions, and what is not one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import RunError
from gemma_tune.recipe.methods import DEFAULT_METHOD
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import Lock, read_lock

BASE = {"name": "gemma-tiny", "revision": None, "files": {}}
DATA = {"label": "rows.jsonl", "sha256": "0" * 64}
LOCK = asdict(
    Lock("r", [], BASE, DATA, {"name": "t", "reason": ""}, {"compute": "float32", "reason": ""}, {"name": "x"}, seed=0)
)


def test_keys_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    old = {key: value for key, value in LOCK.items() if key not in ("method", "processes", "adapter")}
    (tmp_path / "lock.json").write_text(json.dumps(old), encoding="utf-8")
    assert read_lock(RunDir(tmp_path)) == {**LOCK, "method": DEFAULT_METHOD}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "does not say recipe"),
        ([], "not a mapping"),
        ({**LOCK, "base": "gemma-tiny"}, r"does not say base\.name"),
        ({**LOCK, "data": {"label": "x"}}, r"does not say data\.sha256"),
        ({key: value for key, value in LOCK.items() if key != "seed"}, "does not say seed"),
    ],
)
def test_what_is_not_a_lock_is_refused_in_a_sentence(tmp_path: Path, content: Any, told: str) -> None:
    (tmp_path / "lock.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=told):
        read_lock(RunDir(tmp_path))
