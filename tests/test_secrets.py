"""Credentials do not reach a file of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.disk import read_json, write_text
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import start_manifest, update_manifest
from gemma_tune.runs.metrics import append_metrics
from gemma_tune.secrets import mask_secrets

HUB = "hf_" + "AbCd1234" * 4
WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("secret", [HUB, "ghp_" + "a1" * 18, "sk-" + "x" * 40, "github_pat_" + "b2" * 20])
def test_tokens_are_known_by_their_form(secret: str) -> None:
    assert mask_secrets(f"login with '{secret}', please") == "login with '***', please"


def test_other_secrets_are_known_by_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mask_secrets(f"commit {WANDB}") == f"commit {WANDB}"
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("SHORT_TOKEN", "the")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-as-ever")
    assert mask_secrets(f"the key {WANDB} is false-as-ever") == "the key *** is false-as-ever"


def test_what_is_no_token_stays() -> None:
    text = "hf_home hf_transfer sk-learn risk-averse-and-much-longer " + "a" * 64
    assert mask_secrets(text) == text


def test_every_file_of_a_run_is_masked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    start_manifest(run)
    update_manifest(run, status="failed", error=f"HTTPError: 401 for token {HUB}")
    append_metrics(run, {"step": 1, "note": HUB})
    write_text(run.recipe, f"# my token is {HUB}\nmodel: {{}}\n")
    assert read_json(run.manifest)["error"] == "HTTPError: 401 for token ***"
    assert HUB not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
