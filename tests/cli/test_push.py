"""`gemma-tune push`: what it prints, and how its errors end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import constants
from typer.testing import CliRunner

from gemma_tune.cli.push import push
from gemma_tune.errors import ExportError, HubError
from tests.exporting import fake_hub

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with fake_hub.running_hub({TOKEN: ("me",)}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one export."""
    export = tmp_path / "mine-001" / "export" / "gguf-q8_0"
    export.mkdir(parents=True)
    (export / "mine.gguf").write_bytes(b"GGUF" * 1000)
    (export / "notes.txt").write_text("x", encoding="utf-8")
    record = {"format": "gguf-q8_0", "fingerprint": "f", "base": {}, "adapter": {}, "files": {"mine.gguf": 4000}}
    (export / "export.json").write_text(json.dumps(record | {"schema": 1}), encoding="utf-8")
    (tmp_path / "mine-001" / "manifest.json").write_text("{}", encoding="utf-8")
    return tmp_path / "mine-001"


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(push)
    return CliRunner().invoke(app, list(arguments))


def test_the_address_goes_to_stdout_and_the_rest_to_stderr(hub: Any, run: Path) -> None:
    done = invoke(str(run), "me/mine", "--private", "-m", "First")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{hub.url}/me/mine\n"
    assert "not pushed: export.json, notes.txt" in done.stderr and "pushed 1 file," in done.stderr
    assert "no model card" in done.stderr
    assert hub.repositories["me/mine"].private and hub.repositories["me/mine"].commits == ["First"]
    assert set(hub.files("me/mine")) == {"mine.gguf"}
    assert TOKEN not in done.output


def test_json(hub: Any, run: Path) -> None:
    told = json.loads(invoke(str(run), "me/mine", "--json").stdout)
    assert told["repo_id"] == "me/mine" and told["files"] == {"mine.gguf": 4000} and len(told["commit"]) == 40


def test_errors_reach_the_command_line_with_their_exit_code(hub: Any, run: Path) -> None:
    """`cli/app.py` prints a GemmaTuneError and exits with its code."""
    hub.tokens.clear()
    refused = invoke(str(run), "me/mine", "--revision", "v1").exception
    assert isinstance(refused, HubError) and refused.exit_code == 4
    assert refused.hint and refused.hint.endswith("me/mine --revision v1")
    assert TOKEN not in refused.hint
    missing = invoke(str(run / "none"), "me/mine").exception
    assert isinstance(missing, ExportError) and missing.exit_code == 2
