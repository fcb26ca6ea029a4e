"""A user's mistakes: exit code 2, one clear message on stderr, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gemma_tune.paths import TINY_MODEL_DIR

RECIPE = "data: {source: rows.jsonl, max_seq_tokens: 64}\n"
ROW = {"instruction": "Where?", "context": "", "response": "Here.", "category": "open_qa"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    rows = "".join(json.dumps({**ROW, "instruction": f"Where is {n}?"}) + "\n" for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gemma_tune.cli.app", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(folder: Path, *arguments: str) -> str:
    """Run, expect a refusal that leaves no run behind, and return its message."""
    before = sorted(folder.rglob("*"))
    done = run(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.lerning_rate=1e-3", "training.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("training.batch_size=none", "training.batch_size: must be a whole number from 1 to 65536, found 'none'"),
        ("model.name=gemma-7x", "no Gemma is known by the name 'gemma-7x'"),
        ("model.name=./nowhere", "no such directory"),
        ("data.source=missing.jsonl", "missing.jsonl"),
        ("data.template=doly", "did you mean 'dolly'"),
        ("training.optimizer=adamw_8bit", "needs a CUDA card"),
    ],
)
def test_mistakes_in_the_recipe(folder: Path, override: str, told: str) -> None:
    assert told in refused(folder, "train", "mine.yaml", override)


def test_missing_recipe(folder: Path) -> None:
    assert "no such recipe: none.yaml" in refused(folder, "train", "none.yaml")


def test_empty_data_file(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("", encoding="utf-8")
    assert "rows.jsonl" in refused(folder, "train", "mine.yaml", "model.engine=transformers")


def test_rows_without_the_fields_of_the_template(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 9, encoding="utf-8")
    told = refused(folder, "train", "mine.yaml", "model.engine=transformers")
    assert "instruction" in told
    assert "question" in told


def test_a_base_that_is_not_gemma(folder: Path) -> None:
    shutil.copytree(TINY_MODEL_DIR, folder / "llama")
    config = json.loads((folder / "llama" / "config.json").read_text(encoding="utf-8"))
    (folder / "llama" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), encoding="utf-8")
    assert "llama" in refused(folder, "train", "mine.yaml", "model.name=llama")


def test_a_used_run_name(folder: Path) -> None:
    (folder / "runs" / "mine").mkdir(parents=True)
    (folder / "runs" / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "exists already" in refused(folder, "train", "mine.yaml", "run.name=mine")


def test_an_output_folder_that_is_a_file(folder: Path) -> None:
    (folder / "runs").write_text("", encoding="utf-8")
    assert "cannot write to runs" in refused(folder, "train", "mine.yaml")


def test_a_full_and_a_read_only_disk(folder: Path) -> None:
    for options, told in (("size=400k", "the run needs 2.0 MB, 0.4 MB are free"), ("ro", "cannot write to")):
        disk = folder / "disk"
        disk.mkdir(exist_ok=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, check=False
        ).returncode:
            pytest.skip("only root may mount a small disk")
        try:
            assert told in refused(folder, "train", "mine.yaml", "run.output_dir=disk/runs")
        finally:
            subprocess.run(["umount", disk], check=True)


def test_nothing_to_resume(folder: Path) -> None:
    assert "nothing to resume" in refused(folder, "train", "mine.yaml", "--resume")


@pytest.mark.parametrize("command", ["report", "merge", "generate"])
def test_no_such_run(folder: Path, command: str) -> None:
    more = ["--prompt", "x"] if command == "generate" else []
    assert "runs/none" in refused(folder, command, "runs/none", *more)


def test_unknown_command_and_option(folder: Path) -> None:
    for arguments in (["trian", "mine.yaml"], ["train", "mine.yaml", "--fast"]):
        done = run(folder, *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_hints_install_what_the_extras_name_and_never_the_package_itself() -> None:
    """gemma-tune is on no package index."""
    root = Path(__file__).resolve().parents[2]
    sources = {path: path.read_text(encoding="utf-8") for path in (root / "gemma_tune").rglob("*.py")}
    assert [str(path) for path, text in sources.items() if "pip install 'gemma-tune" in text] == []
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = "".join(sources.values())
    for name in ("unsloth", "gguf-quant", "eval", "kaggle"):
        assert f"pip install {' '.join(map(repr, extras[name]))}" in text


def test_a_missing_run_is_not_a_hub_id(folder: Path) -> None:
    told = refused(folder, "generate", "runs/nope", "--prompt", "x")
    assert "there is no run runs/nope" in told and "hub_id" not in told
    (folder / "mine" / "first").mkdir(parents=True)
    (folder / "mine" / "first" / "manifest.json").write_text("{}", encoding="utf-8")
    assert "did you mean 'first'?" in refused(folder, "generate", "mine/frist", "--prompt", "x")


def test_rows_and_recipe_mixed_up(folder: Path) -> None:
    assert "gemma-tune init rows.jsonl writes a recipe" in refused(folder, "train", "rows.jsonl")
    told = refused(folder, "train", "mine.yaml", "data.source=mine.yaml")
    assert "mine.yaml is a recipe or a data template, and rows are expected" in told
