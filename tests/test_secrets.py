"""Credentials reach no screen, no file of a run, nothing that becomes public, and no recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.text import Text

from gemma_tune.data.text.pii import find_pii, mask_pii
from gemma_tune.disk import read_json, write_text
from gemma_tune.doctor.finding import Finding
from gemma_tune.doctor.report import bug_report
from gemma_tune.errors import DataError, RecipeError
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import start_manifest, update_manifest
from gemma_tune.runs.metrics_log import append_metrics
from gemma_tune.secrets import SECRET_KINDS, mask_private, mask_secrets
from gemma_tune.terminal import Terminal, TerminalReporter, make_table
from tests.made_secrets import SECRETS, telling_part

HUB = "hf_" + "AbCd1234" * 4
WANDB = "0123456789abcdef0123456789abcdef01234567"


# Written here and not made of the table, so that a form that is taken out of it is missed.
FORMS = {
    "hf_": 34, "api_org_": 34, "wandb_v1_": 32, "KGAT_": 32, "ghp_": 36, "gho_": 36, "ghs_": 36, "ghu_": 36, "ghr_": 36,
    "github_pat_": 40, "glpat-": 20, "sk-": 40, "sk-ant-": 40, "sk_live_": 24, "rk_test_": 24, "AIza": 35, "xoxb-": 24,
    "xoxp-": 24, "npm_": 36, "pypi-AgEI": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "secret",
    [*(mark + ("a1B2" * 10)[:length] for mark, length in FORMS.items()), "AKIA" + "A1B2" * 4, "ASIA" + "C3D4" * 4],
)
def test_tokens_are_known_by_their_form(secret: str) -> None:
    assert mask_secrets(f"login with '{secret}', please") == "login with '***', please"


def test_no_kind_is_taken_out_of_the_table() -> None:
    assert {kind.name for kind in SECRET_KINDS} >= {
        "Hugging Face", "Weights & Biases", "Kaggle", "GitHub", "GitHub, fine-grained", "GitLab", "OpenAI, Anthropic",
        "Stripe", "AWS", "Google", "Slack", "npm", "PyPI", "JSON web token", "private key", "key in a web address",
        "web address with a password",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("address", "masked"),
    [
        ("https://ada:p4ss@w0rd@host/x", "https://***@host/x"),
        ("https://0a1b2c3d4e5f6a7b8c9d0e@host/x", "https://***@host/x"),
        ("https://host/x?v=1&X-Amz-Signature=0a1b2c3d4e5f&n=2", "https://host/x?v=1&***&n=2"),
        ("https://host/x?sig=0a1b2c3d%3D", "https://host/x?***"),
        ("ssh://git@host/x https://host/x?page=12345678", "ssh://git@host/x https://host/x?page=12345678"),
    ],
)
def test_credentials_in_web_addresses(address: str, masked: str) -> None:
    assert mask_secrets(address) == masked


def test_other_secrets_are_known_by_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mask_secrets(f"commit {WANDB}") == f"commit {WANDB}"
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("SHORT_TOKEN", "the")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-as-ever")
    assert mask_secrets(f"the key {WANDB} is false-as-ever") == "the key *** is false-as-ever"


def test_what_is_no_token_stays() -> None:
    text = "hf_home hf_transfer sk-learn risk-averse-and-much-longer npm_config_registry pypi-server "
    text += "https://host:8080/a@b " + "a" * 64
    assert mask_secrets(text) == text


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
def test_no_kind_is_printed(kind: str, secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"see {secret}, please"
    terminal = Terminal()
    terminal.error(DataError(text, hint=text))
    for shown in (text, Text(text)):
        terminal.note(shown)
        terminal.result(shown)
    terminal.result(make_table(("a", secret), [(text, Text(text))]))
    terminal.result_inline(Text(text))
    terminal.plain(text)
    terminal.json({"a": [text]})
    reporter = TerminalReporter(terminal)
    reporter.stage(text)
    reporter.detail(text)
    reporter.warn(text)
    reporter.progress(text, 1, 1)
    printed = "".join(capsys.readouterr())
    assert printed.count("***") >= 15 and telling_part(secret) not in printed


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
def test_no_kind_is_written_into_a_run_or_a_bug_report(kind: str, secret: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    start_manifest(run)
    update_manifest(run, status="failed", error=secret)
    append_metrics(run, {"step": 1, "note": secret})
    write_text(run.recipe, f"# {secret}\n")
    with libraries_to(run.library_log):
        sys.stderr.write(f"401 for {secret}\n")
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert written.count("***") == 4
    shown = bug_report([Finding("hub", "fail", f"401 for {secret}", secret)])
    assert telling_part(secret) not in written + shown + mask_private(f"- `{secret}`") and "***" in shown


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
@pytest.mark.parametrize("frame", ["{}", "the key is {}.", '{{"key": "{}"}}', "export KEY={}\n"])
def test_every_kind_is_found_in_rows(kind: str, secret: str, frame: str) -> None:
    text = frame.format(secret)
    assert {match.kind for match in find_pii(text)} == {"secret"}
    assert telling_part(secret) not in mask_pii(text) and "[SECRET]" in mask_pii(text)


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
def test_no_kind_is_taken_in_a_recipe(kind: str, secret: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"data": {"source": secret, "max_seq_tokens": 64}}), encoding="utf-8")  # JSON is YAML
    with pytest.raises(RecipeError, match="a recipe never holds a credential") as refused:
        load_recipe(recipe)
    assert telling_part(secret) not in refused.value.message


def test_every_file_of_a_run_is_masked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    start_manifest(run)
    update_manifest(run, status="failed", error=f"HTTPError: 401 for token {HUB}")
    append_metrics(run, {"step": 1, "note": HUB})
    write_text(run.recipe, f"# my token is {HUB}\nmodel: {{}}\n")
    assert read_json(run.manifest)["error"] == "HTTPError: 401 for token ***"
    assert HUB not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
