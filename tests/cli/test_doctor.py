"""`gemma-tune doctor` as it is started: exit code, table, JSON and report, and what must not be in them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = (
    "import json, sys, typer\n"
    "from gemma_tune.cli.doctor import doctor\n"
    "app = typer.Typer()\n"
    "app.command()(doctor)\n"
    "try:\n"
    "    app()\n"
    "finally:\n"
    "    sys.stderr.write('\\nmodules: ' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))\n"
)
HEAVY = {"torch", "transformers", "trl", "unsloth", "datasets", "bitsandbytes", "numpy", "huggingface_hub", "pyarrow"}
TOKEN = "hf_plantedplantedplantedplanted"


def _doctor(*arguments: str, home: Path, **environment: str) -> tuple[int, str, str, float]:
    variables = {
        **os.environ,
        "HOME": str(home),
        "LOGNAME": "martha-the-user",
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_TOKEN": TOKEN,
        "GEMMA_TUNE_CACHE": str(home / "private-cache"),
        **environment,
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=variables,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


@pytest.mark.slow
def test_this_machine_passes(tmp_path: Path) -> None:
    code, out, err, _ = _doctor("--json", home=tmp_path)
    told = json.loads(out)
    verdicts = {item["name"]: item["verdict"] for item in told["findings"]}
    assert code == 0 and told["verdict"] == "warn", out
    assert verdicts["hub"] == "warn"
    for name in ("Python", "PyTorch", "precision", "packages", "4-bit kernels", "unsloth", "trl", "limits"):
        assert verdicts[name] == "ok", out
    assert all(item["fix"] for item in told["findings"] if item["verdict"] != "ok")
    modules = set(err.rpartition("modules: ")[2].split())
    assert not modules & HEAVY
    assert "martha" not in told["report"] and "private-cache" not in told["report"]
    assert str(tmp_path) not in told["report"]


@pytest.mark.slow
def test_a_broken_machine_and_a_recipe_that_cannot_run(tmp_path: Path) -> None:
    """An old transformers, kernels that crash, a T4 and its driver, rows that are missing."""
    modules, program = tmp_path / "modules", tmp_path / "bin"
    (modules / "bitsandbytes").mkdir(parents=True)
    (modules / "bitsandbytes" / "__init__.py").write_text("import os\nos.kill(os.getpid(), 11)\n", encoding="ascii")
    (modules / "transformers-4.40.0.dist-info").mkdir()
    (modules / "transformers-4.40.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 4.40.0\n", encoding="ascii"
    )
    program.mkdir()
    (program / "nvidia-smi").write_text("#!/bin/sh\necho '550.54.15, Tesla T4, 15360 MiB'\n", encoding="ascii")
    (program / "nvidia-smi").chmod(0o755)
    (tmp_path / "mine.yaml").write_text(
        "model: {name: google/gemma-2b}\ndata: {source: rows.jsonl, max_seq_tokens: 64}\n", encoding="ascii"
    )
    path = f"{program}{os.pathsep}{os.environ['PATH']}"
    environment = {"PYTHONPATH": str(modules), "PATH": path, "COLUMNS": "100"}
    code, out, err, _ = _doctor("mine.yaml", home=tmp_path, **environment)
    assert code == 1
    failed = set(re.findall(r"^✗ fail +(.+?)  ", out, re.MULTILINE))
    assert failed >= {"PyTorch", "transformers", "4-bit kernels", "model", "data"}, out
    assert "crashed (SIGSEGV) while importing bitsandbytes" in out
    assert "→ pip install 'transformers==5.17.0'" in out and "→ pip install 'bitsandbytes==0.50.2'" in out
    assert "a run would not work" in out and "\x1b" not in out + err


def test_a_wrong_recipe_is_told_at_once(tmp_path: Path) -> None:
    from gemma_tune.cli.doctor import doctor
    from gemma_tune.errors import RecipeError

    with pytest.raises(RecipeError, match=r"no such recipe"):
        doctor(tmp_path / "nowhere.yaml")


@pytest.mark.slow
def test_the_report_is_one_block(tmp_path: Path) -> None:
    code, out, _, _ = _doctor("--report", "--seconds", "1", home=tmp_path)
    assert out.startswith("```\ngemma-tune doctor: ") and out.endswith("```\n")
    assert code == (1 if "doctor: fail" in out else 0)
    assert str(tmp_path) not in out and "martha" not in out
