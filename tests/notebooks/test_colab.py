"""The Colab notebook: every cell runs headless on the embedded Gemma, and a training that was cut off goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.layout import open_run
from gemma_tune.runs.manifest import read_manifest
from gemma_tune.runs.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "gemma_tune_colab.ipynb"
RUN_CELLS = Path(__file__).with_name("run_cells.py")
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in CELLS}


def start(folder: Path, forms: dict[str, object], *cells: str) -> subprocess.Popen[str]:
    """Run cells (all of them unless named) in a process of their own. `gemma-tune` notes its process id in pids."""
    command = folder / "bin" / "gemma-tune"
    command.parent.mkdir(exist_ok=True)
    command.write_text(
        f'#!/bin/sh\necho $$ >> "{folder}/pids"\nexec "{sys.executable}" -m gemma_tune.cli.app "$@"\n', encoding="utf-8"
    )
    command.chmod(0o755)
    return subprocess.Popen(
        [sys.executable, str(RUN_CELLS), str(NOTEBOOK), json.dumps(forms), *cells],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "IPYTHONDIR": str(folder / "ipython"),
            "HF_HUB_OFFLINE": "1",
            # Models of this size only wait for each other's threads on a busy machine.
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def test_it_is_clean_and_pinned() -> None:
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z-]{1,64}", cell_id) for cell_id in ids)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    package = re.search(r'PACKAGE = "gemma-tune\[(\S+)\]==(\S+)"', SOURCES["install"])
    assert package is not None
    assert set(package[1].split(",")) <= set(project["optional-dependencies"])
    assert package[2] == project["version"]


def test_every_command_and_option_exists() -> None:
    """So that a command that is renamed is renamed here, too."""
    from typer.main import get_command

    from gemma_tune.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = [line.split() for text in SOURCES.values() for line in text.splitlines() if "!gemma-tune" in line]
    assert [words[1] for words in found] == [
        "doctor", "init", "plan", "data", "train", "generate", "export", "push",
    ]  # fmt: skip
    for words in found:
        command = commands[words[1]]
        if words[1] == "data":
            command = command.commands[words[2]]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_it_says_where_the_work_is_kept(tmp_path: Path) -> None:
    for module, text in {
        "google/colab/drive.py": "def mount(path): print('mounted', path)\n",
        "google/colab/userdata.py": "def get(name): return f'secret {name} of Colab'\n",
        "kaggle_secrets.py": "class UserSecretsClient:\n    def get_secret(self, name): return f'{name} of Kaggle'\n",
    }.items():
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text(text, encoding="utf-8")
    (tmp_path / "google" / "colab" / "__init__.py").touch()
    work = tmp_path / "my work"
    for platform, token in (("Colab", "secret HF_TOKEN of Colab"), ("Kaggle", "HF_TOKEN of Kaggle"), ("other", None)):
        forms: dict[str, object] = {"PLATFORM": platform, "WORK_DIR": str(work), "HAS_TOKEN": token is not None}
        out = finish(start(tmp_path, forms, "install", "folder", "login"))
        assert 'pip install -q "gemma-tune[' in out.replace("pip -q", "pip install -q")
        assert ("mounted /content/drive" in out) == (platform == "Colab")
        assert f"! No Google Drive: {work} may be gone" in out
        assert work.is_dir()
    # A refused or missing Drive stops the cell, before anything is trained that would be lost.
    (tmp_path / "google" / "colab" / "drive.py").write_text("def mount(path): raise ValueError('mount failed')\n")
    failed = start(tmp_path, {"PLATFORM": "Colab", "WORK_DIR": str(tmp_path / "other")}, "folder")
    out, _ = failed.communicate(timeout=60)
    assert failed.returncode == 1 and "mount failed" in out
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_all_cells_run_and_a_cut_off_training_goes_on(tmp_path: Path) -> None:
    settings = (
        "training.max_steps=6 training.save_every_steps=1 model.engine=transformers data.max_eval_rows=4 "
        "evaluation.num_questions=1 evaluation.max_new_tokens=8"
    )
    work = tmp_path / "work"
    forms: dict[str, object] = {
        "PLATFORM": "other",
        "WORK_DIR": str(work),
        "HAS_TOKEN": False,
        "ROWS": "tiny-world",
        "GOAL": "instruct",
        "MODEL": "gemma-tiny",
        "SETTINGS": settings,
    }
    first = start(tmp_path, forms, "folder", "recipe", "train")
    run = work / "runs" / "first"
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "checkpoint-2").is_dir():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    # A runtime that is taken away sends no signal that could be answered.
    os.kill(int((tmp_path / "pids").read_text().split()[-1]), signal.SIGKILL)
    first.communicate(timeout=60)
    stopped_at = read_manifest(open_run(run)).step
    assert read_manifest(open_run(run)).status == "running" and stopped_at < 6

    # Everything again from the top, as after a disconnect.
    out = finish(start(tmp_path, forms))
    cells = [cell["id"] for cell in CELLS if cell["cell_type"] == "code"]
    assert [line.removeprefix("--- ") for line in out.splitlines() if line.startswith("--- ")] == cells
    assert "recipe.yaml is kept as it is." in out
    assert "resuming from checkpoint-" in out
    manifest = read_manifest(open_run(run))
    assert (manifest.status, manifest.step, len(manifest.resumes)) == ("finished", 6, 1)
    assert [row["step"] for row in read_metrics(open_run(run)) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert load_recipe(work / "recipe.yaml").recipe.data.source == "tiny-world"
    assert list((run / "export" / "gguf-q8_0").glob("*.gguf"))
    assert "Not pushed: name a repository" in out
