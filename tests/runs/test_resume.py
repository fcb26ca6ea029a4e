"""What may differ when a run goes on, and that two processes never train in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.errors import RunError
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import start_manifest, update_manifest
from gemma_tune.runs.resume import hold_run, interrupted_run, is_held, lock_differences, recipe_differences


def recipe_of(**sections: dict[str, object]) -> Recipe:
    return Recipe.model_validate(
        {**sections, "data": {"source": "x", "max_seq_tokens": 64, **sections.get("data", {})}}
    )


def test_more_steps_and_other_logging_are_allowed_and_told() -> None:
    now = recipe_of(training={"max_steps": 5}, logging={"every_steps": 7}, run={"name": "b"})
    found = recipe_differences(recipe_of(), now)
    assert found.refused == []
    assert found.allowed == [
        "training.max_steps: None → 5",
        "logging.every_steps: 1 → 7",
        "run.name: None → 'b'",
    ]


def test_every_other_setting_of_the_computation_is_refused() -> None:
    now = recipe_of(
        model={"dtype": "float32"}, lora={"rank": 8}, data={"seed": 1}, training={"seed": 1, "max_grad_norm": 0.3}
    )
    assert [line.split(":")[0] for line in recipe_differences(recipe_of(), now).refused] == [
        "model.dtype", "lora.rank", "data.seed", "training.max_grad_norm", "training.seed",
    ]  # fmt: skip


def test_the_lock_tells_versions_and_refuses_other_files() -> None:
    before = {
        "base": {"name": "a", "files": {"x.safetensors": "0" * 64}},
        "data": {"label": "rows", "sha256": "1" * 64},
        "engine": {"name": "unsloth", "reason": "r"},
        "packages": {"torch": "2.13.0", "peft": "0.21.2"},
        "overrides": ["a=1"],
    }
    now = {
        "base": {"name": "b", "files": {"x.safetensors": "f" * 64}},
        "data": {"label": "other", "sha256": "1" * 64},
        "engine": {"name": "transformers", "reason": "s"},
        "packages": {"torch": "2.12.0", "peft": "0.21.2"},
        "overrides": [],
    }
    found = lock_differences(before, now)
    assert found.refused == [
        "base.files.x.safetensors: 000000000000… → ffffffffffff…",
        "engine.name: 'unsloth' → 'transformers'",
    ]
    assert found.allowed == ["packages.torch: '2.13.0' → '2.12.0'"]


def test_one_process_holds_a_run_until_it_dies(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    program = f"""
import time
from pathlib import Path
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.resume import hold_run
with hold_run(RunDir(Path({str(tmp_path)!r}))):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert is_held(run)
    with pytest.raises(RunError, match=r"being trained by another process"), hold_run(run):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not is_held(run)
    with hold_run(run):
        assert is_held(run)


@pytest.mark.parametrize(
    ("status", "is_interrupted"), [("running", True), ("stopped", True), ("failed", True), ("finished", False)]
)
def test_what_counts_as_interrupted(tmp_path: Path, status: str, is_interrupted: bool) -> None:
    run = RunDir(tmp_path / "r-001")
    run.path.mkdir()
    assert interrupted_run(tmp_path, name=None, recipe_name="r") is None
    start_manifest(run)
    run.resolved_recipe.write_text("", encoding="utf-8")
    update_manifest(run, status=status)
    for name in (None, "r-001"):
        assert (interrupted_run(tmp_path, name=name, recipe_name="r") == run) == is_interrupted
    with hold_run(run):
        assert interrupted_run(tmp_path, name=None, recipe_name="r") is None
