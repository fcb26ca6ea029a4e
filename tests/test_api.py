"""The functions of `from gemma_tune import …`, and that importing them costs nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_tune
from gemma_tune import api
from gemma_tune.errors import EngineError, RecipeError
from gemma_tune.machine.cards import CARDS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "numpy", "pydantic", "rich", "typer", "ruamel"}


def run_python(program: str, folder: Path, *, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        # One thread: models of this size only wait for each other's threads on a busy machine.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_and_planning_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import json, sys\n"
        "names = lambda: sorted({name.split('.')[0] for name in sys.modules})\n"
        "import gemma_tune\nat_import = names()\n"
        "from gemma_tune import load_recipe, plan, train, merge, export, generate, score\n"
        "plan('gemma-7b-dolly', gpu='t4')\n"
        "print(json.dumps([at_import, names()]))\n"
    )
    at_import, planned = map(set, json.loads(run_python(program, tmp_path)))
    assert "gemma_tune" in at_import and not at_import & HEAVY
    assert not planned & {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "huggingface_hub"}


def test_the_stub_the_names_and_the_functions_agree() -> None:
    stub = (ROOT / "gemma_tune" / "__init__.pyi").read_text(encoding="utf-8")
    declared = dict(re.findall(r"from (\S+) import \w+ as (\w+)", stub))
    assert set(declared.values()) <= set(gemma_tune.__all__)
    assert set(re.findall(r" as (\w+)", stub)) == set(gemma_tune.__all__)
    for name in ("load_recipe", "plan", "train", "merge", "export", "generate", "score"):
        assert getattr(gemma_tune, name) is getattr(api, name)
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match=r"no attribute 'tune'"):
        gemma_tune.tune  # noqa: B018


def test_export_stays_the_function_when_the_subpackage_is_imported() -> None:
    import gemma_tune.exporting.formats.registry
    from gemma_tune import export
    from gemma_tune.exporting.formats import registry as formats

    assert export is api.export
    assert gemma_tune.export is api.export
    assert "merged-16bit" in formats.FORMATS
    assert sys.modules["gemma_tune.exporting.formats.registry"] is formats


def test_a_plan_is_that_of_the_command(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom gemma_tune.cli import app\n"
        "sys.argv = ['gemma-tune', 'plan', 'gemma-7b-dolly', 'lora.rank=8', '--gpu', 't4', '--json']\n"
        "import typer\nfrom gemma_tune.cli.plan import plan\n"
        "alone = typer.Typer(); alone.command()(plan); sys.argv.remove('plan'); alone()\n"
    )
    told = json.loads(run_python(program, tmp_path))
    for recipe, overrides in (
        ("gemma-7b-dolly", ["lora.rank=8"]),
        (gemma_tune.load_recipe("gemma-7b-dolly", ["lora.rank=8"]), []),
    ):
        planned = gemma_tune.plan(recipe, overrides, gpu="t4")
        assert planned.card == CARDS["t4"]
        assert (planned.verdict, planned.need_bytes) == (told["verdict"], told["need_bytes"])
        assert planned.schedule.steps == told["schedule"]["steps"]


def test_without_a_card_there_is_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gemma_tune.plan("gemma-7b-dolly").verdict is None


def test_mistakes() -> None:
    with pytest.raises(EngineError, match=r"no card is known by the name 't5'"):
        gemma_tune.plan("gemma-7b-dolly", gpu="t5")
    with pytest.raises(RecipeError, match=r"did you mean 'quickstart'\?"):
        gemma_tune.load_recipe("quickstrat")
    with pytest.raises(TypeError, match=r"loaded already"):
        gemma_tune.train(gemma_tune.load_recipe("quickstart"), ["training.max_steps=1"])


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    used = set(re.findall(r"\b(load_recipe|plan|train|merge|export|generate|score|load)\(", "\n".join(blocks)))
    assert used == set(gemma_tune.__all__) - {"Gemma"}
    out = run_python("\n".join(blocks), tmp_path, timeout=300)
    lines = out.splitlines()
    assert lines[0] == "1024"
    assert lines[1].startswith("plan: fits: needs") and lines[1].endswith("of the 15.8 GB of T4")
    assert "runs/quickstart-001 runs/quickstart-001/adapter" in out
    assert "merged-16bit runs/quickstart-001/export/merged-16bit" in out
    assert "did you mean 'learning_rate'?" in out
    assert (tmp_path / "runs" / "quickstart-001" / "export" / "adapter" / "adapter_config.json").is_file()
