"""`gemma-tune plan`: what it prints, what a program gets, and how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from gemma_tune.cli.plan import plan
from gemma_tune.errors import EngineError, GemmaTuneError, ModelError, RecipeError
from gemma_tune.recipe.load import load_recipe

PlanCommand = Callable[..., tuple[str, int]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> PlanCommand:
    """Run `plan` in an empty folder without a card; returns stdout and the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(plan)

    def run(*arguments: str) -> tuple[str, int]:
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            app()
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        return out, int(ended.value.code or 0)

    return run


def test_a_recipe_that_fits(command: PlanCommand) -> None:
    out, code = command("gemma-7b-dolly", "--gpu", "l4")
    assert code == 0
    assert "gemma-7b-dolly on L4" in out
    assert "weights in 4 bits" in out and "arXiv:2305.14314" in out
    assert "usable on L4" in out and "fits" in out
    assert "892 steps" in out and "14,261 of about 187 tokens" in out


def test_one_that_does_not_says_what_would_and_ends_with_1(command: PlanCommand) -> None:
    out, code = command("gemma-7b-dolly", "--gpu", "GB=8")
    assert code == 1
    assert "does not fit" in out and "What would fit" in out
    lines = [line.strip() for line in out.splitlines() if line.startswith("   ") and "=" in line]
    first = lines[: next((index for index, line in enumerate(lines) if line in lines[:index]), len(lines))]
    load_recipe(Path("gemma-7b-dolly"), first)  # they can be pasted as they stand
    assert command("gemma-7b-dolly", *first, "--gpu", "GB=8")[1] == 0


def test_without_a_card_a_table_over_cards(command: PlanCommand) -> None:
    out, code = command("gemma-2b-dolly")
    assert code == 0
    assert "no card was found here" in out
    assert all(name in out for name in ("T4", "RTX 4090", "H100 80GB", "8,192"))
    # A T4 has no bfloat16: it is left out of the table instead of ending the command.
    asked = command("gemma-2b-dolly", "model.dtype=bfloat16")[0]
    assert "T4" not in asked and "L4" in asked


def test_the_card_of_this_machine(command: PlanCommand, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034, 8.9'\n")
    program.chmod(0o755)
    out, code = command("gemma-2b-dolly")
    assert code == 0 and "gemma-2b-dolly on L4" in out


def test_json_holds_everything(command: PlanCommand) -> None:
    out, code = command(
        "gemma-7b-dolly", "--gpu", "t4", "--json", "training.batch_size=64", "model.engine=transformers"
    )
    told = json.loads(out)
    assert code == (1 if told["verdict"] == "does not fit" else 0)
    assert told["need_bytes"] == (
        told["resident_bytes"]
        + max(moment["bytes"] for moment in told["moments"])
        + told["margin_bytes"]
        + told["context_bytes"]
    )
    assert all(part["how"] for part in told["resident"] + told["moments"] + told["host"] + told["disk"])
    assert {row["tokens"] for row in told["table"]} == {512, 1024, 2048, 4096, 8192}
    assert told["changes"][0]["overrides"]
    assert told["schedule"]["steps"] == 28
    assert told["compute"] == "float16" and told["engine"] == "transformers"


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (("gemma-7b-dolly", "--gpu", "rtx-4900"), EngineError, r"did you mean 'rtx-4090'"),
        (("gemma-7b-dolly", "--gpu", "t4", "model.dtype=bfloat16"), EngineError, r"bfloat16 would be emulated"),
        (("gemma-7b-dolly", "lora.targets=[qproj]"), ModelError, r"names no module"),
        (("gemma-7b-dolly", "model.name=owner/other"), ModelError, r"not in the registry"),
        (("no-such-recipe",), RecipeError, r"no such recipe"),
    ],
)
def test_mistakes_end_with_2(
    command: PlanCommand, arguments: tuple[str, ...], error: type[GemmaTuneError], told: str
) -> None:
    with pytest.raises(error, match=told) as raised:
        command(*arguments)
    assert raised.value.exit_code == 2
