"""`gemma-tune launch`: what it prints, writes and hands over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from gemma_tune.cli.launch import launch
from gemma_tune.errors import GemmaTuneError, LaunchError, RecipeError
from gemma_tune.launching.launch import SCHEDULERS
from tests.launching.fake_programs import Cluster

Launch = Callable[..., tuple[str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Launch:
    """Run `launch` in a folder of its own; returns stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(launch)

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        with pytest.raises(SystemExit) as ended:
            app()
        assert ended.value.code in (0, None)
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err
        return out, err

    return run


def test_without_a_file_it_is_printed(command: Launch, tmp_path: Path) -> None:
    out, err = command("quickstart", "lora.rank=8", "--on", "slurm", "--gpus", "2", "--time", "2h")
    assert out.startswith("#!/bin/bash\n") and out.endswith('exit "$code"\n')
    assert "  lora.rank=8\n  run.name=quickstart\n  run.resume=auto\n  --nproc 2\n" in out
    assert "write it with -o quickstart.sbatch, then submit it: sbatch quickstart.sbatch" in err
    assert not list(tmp_path.iterdir())


def test_what_is_printed_is_what_is_written(command: Launch, tmp_path: Path) -> None:
    arguments = ("quickstart", "--on", "kubernetes", "--image", "i", "--claim", "work", "--nodes", "2")
    out, _ = command(*arguments)
    written, err = command(*arguments, "-o", "my job.yaml")
    assert written == "" and (tmp_path / "my job.yaml").read_text(encoding="utf-8") == out
    assert "submit it: kubectl apply -f 'my job.yaml'" in err
    with pytest.raises(RecipeError, match=r"my job\.yaml exists already"):
        command(*arguments, "--gpus", "8", "-o", "my job.yaml")


def test_submit(command: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"sbatch is not on the PATH"):
        command("quickstart", "--on", "slurm", "--submit")
    assert not list(tmp_path.iterdir())
    cluster = Cluster(tmp_path)
    cluster.add("sbatch")
    monkeypatch.setenv("SAYS", "Submitted batch job 7")
    out, err = command("quickstart", "--on", "slurm", "--submit")
    assert out == "Submitted batch job 7\n" and "✓ quickstart.sbatch" in err
    assert cluster.arguments("sbatch") == [["quickstart.sbatch"]]
    out, _ = command("quickstart", "--on", "slurm", "--submit", "-o", "other", "--json")
    told = json.loads(out)
    assert told["reply"] == "Submitted batch job 7\n" and told["file"] == "other"
    assert cluster.arguments("sbatch") == [["quickstart.sbatch"], ["other"]]


def test_json(command: Launch) -> None:
    arguments = (
        "quickstart",
        "run.name=first",
        "--on",
        "skypilot",
        "--bucket",
        "b",
        "--image",
        "i",
        "--gpu-type",
        "L4",
    )
    told = json.loads(command(*arguments, "--json")[0])
    assert told["text"] == command(*arguments)[0]
    assert told["submit"] == "sky jobs launch first.sky.yaml"
    assert (told["on"], told["run"], told["file"], told["reply"]) == ("skypilot", "first", None, None)
    assert told["notes"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quickstart", "lora.rnk=8", "--on", "slurm"], r"lora\.rnk"),
        (["gone", "--on", "slurm"], r"no such recipe"),
        (["quickstart", "--on", "slurm", "--claim", "x"], r"--claim is not an option of slurm; it belongs to kub"),
        (["quickstart", "--on", "kubernetes", "--claim", "x"], r"--on kubernetes needs --image"),
        (["quickstart", "--on", "slurm", "--gpu-type", "h 100"], r"--gpu-type 'h 100' holds a blank"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(
    command: Launch, tmp_path: Path, arguments: list[str], told: str
) -> None:
    with pytest.raises(GemmaTuneError, match=told) as mistake:
        command(*arguments, "-o", "job")
    assert mistake.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [["--on", "slurm"], ["--on", "kubernetes", "--image", "i", "--claim", "c"],
     ["--on", "skypilot", "--bucket", "b", "--image", "i", "--gpu-type", "L4"]],
    ids=lambda options: options[1],
)  # fmt: skip
def test_nothing_heavy_is_loaded(options: list[str]) -> None:
    program = (
        "import sys, typer\n"
        "from gemma_tune.cli.launch import launch\n"
        f"sys.argv = ['launch', 'quickstart', *{options!r}]\n"
        "try:\n    typer.run(launch)\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL, check=True, timeout=60)


def test_every_scheduler_and_option_can_be_named() -> None:
    hints = get_type_hints(launch)
    assert get_args(hints["on"]) == tuple(SCHEDULERS)
    assert {name for each in SCHEDULERS.values() for name in each.option_names} <= set(hints)
