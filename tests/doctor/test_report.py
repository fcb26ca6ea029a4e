"""A bug report says what is installed and found, and nothing about whose machine it is."""

from __future__ import annotations

import getpass
import importlib.metadata
import platform
import socket

import pytest

from gemma_tune.doctor.finding import Finding, worst
from gemma_tune.doctor.report import bug_report, hide_names

TOKEN = "hf_plantedplantedplantedplanted"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "marthas-laptop.lan")
    monkeypatch.setattr(getpass, "getuser", lambda: "martha")
    monkeypatch.setenv("HOME", "/export/people/martha")
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")


def test_nothing_private_is_in_a_report(planted: None) -> None:
    findings = [
        Finding("disk", "fail", "/export/people/martha/private-project/runs (runs) cannot be written to", "fix it"),
        Finding("trl", "fail", "ImportError: /home/bob/venv/lib/x.so while importing trl"),
        Finding("hub", "warn", f"token {TOKEN} and a-token-of-another-form refused on marthas-laptop"),
        Finding("data", "ok", "C:\\Users\\Martha\\secret folder\\rows.jsonl, /Users/eve/Notes/rows.csv"),
    ]
    report = bug_report(findings)
    people = ("martha", "Martha", "bob", "eve", "laptop")
    for private in (*people, "private-project", "Notes", "/export", TOKEN, "a-token-of"):
        assert private not in report, private
    assert "cannot be written to" in report and "fail  trl" in report
    assert report.startswith("```\ngemma-tune doctor: fail\n") and report.endswith("\n```")


def test_versions_and_hardware_are_in_it() -> None:
    report = bug_report([Finding("graphics card", "ok", "Tesla T4, 15360 MiB; driver 550.54.15")])
    assert f"Python {platform.python_version()}" in report and "Tesla T4" in report
    for package in ("torch", "transformers", "trl", "bitsandbytes"):
        assert f"{package} {importlib.metadata.version(package)}" in report


def test_common_names_do_not_make_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert hide_names("root of localhost") == "root of localhost"


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    assert hide_names("text") == "text"


def test_the_worst_verdict_counts() -> None:
    ok, warn, fail = Finding("a", "ok", ""), Finding("b", "warn", ""), Finding("c", "fail", "")
    assert (worst([]), worst([ok]), worst([warn, ok]), worst([ok, fail, warn])) == ("ok", "ok", "warn", "fail")
