"""Versions from package metadata; pip's own resolver rules (packaging) and pyproject.toml are the oracle."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from gemma_tune.doctor import packages
from gemma_tune.doctor.finding import Finding, worst
from gemma_tune.doctor.packages import KNOWN_BAD, check_gguf, check_packages, read_tested_set
from tests.doctor.conftest import Dist

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _by_name(findings: list[Finding], name: str) -> Finding:
    (finding,) = (item for item in findings if item.name == name)
    return finding


def test_the_read_tested_set_is_that_of_the_project() -> None:
    wanted = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert wanted < {requirement.name for requirement in read_tested_set()}
    assert "pytest" not in {requirement.name for requirement in read_tested_set()}


def test_without_a_checkout_the_metadata_says_it(
    installed: Dist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("gemma-tune", "9.9", "torch>=2.11", 'gguf>=0.19; extra == "gguf"', 'pytest>=9; extra == "dev"')
    monkeypatch.setattr(packages, "PACKAGE_DIR", tmp_path / "site-packages" / "gemma_tune")
    assert [requirement.name for requirement in read_tested_set()] == ["torch", "gguf"]


def test_this_environment_is_as_tested() -> None:
    findings = check_packages("cpu")
    assert worst(findings) == "ok", findings
    assert findings[-1].found.endswith("installed, all in the tested versions")


def test_an_old_transformers(installed: Dist) -> None:
    installed("transformers", "4.40.0", "tokenizers<0.20,>=0.19", "torch; extra == 'torch'")
    findings = check_packages("cpu")
    assert worst(findings) == "fail"
    known = _by_name(findings, "transformers")
    assert known.verdict == "fail" and known.found.startswith("4.40.0") and "CVE-2026-1839" in known.found
    assert known.fix == "pip install 'transformers==5.17.0'"
    conflict = _by_name(findings, "package conflict")
    assert "transformers asks for tokenizers<0.20, installed is" in conflict.found
    assert "trl asks for transformers>=4.56.2, installed is 4.40.0" in conflict.found


def test_versions_that_nobody_tested(installed: Dist) -> None:
    installed("peft", "0.22.0")
    installed("rich", "13.0")
    finding = check_packages("cpu")[-1]
    assert finding.verdict == "warn"
    assert finding.found == "not as tested: peft 0.22.0 (tested ==0.21.2), rich 13.0 (tested >=14)"
    assert finding.fix == "pip install 'peft==0.21.2' 'rich>=14'"


@pytest.mark.parametrize(
    ("package", "version", "device", "told"),
    [
        ("trl", "1.15.0", "cpu", "crashes on a CPU"),
        ("trl", "1.16.0", "cpu", "crashes on a CPU"),
        ("trl", "1.16.0", "cuda", "Unsloth 2026.10.9"),
        ("transformers", "5.18.0", "cuda", "Unsloth 2026.10.9"),
        ("torch", "2.15.0+cu130", "cuda", "below 2.15"),
        ("torch", "2.5.1", None, "CVE-2025-32434"),
        ("datasets", "5.0.0", "cuda", "below 5"),
        ("unsloth", "2026.8.19", "cpu", "no CPU backend"),
        ("peft", "0.17.0", "cuda", "needs 0.18"),
    ],
)
def test_known_bad_versions(installed: Dist, package: str, version: str, device: str | None, told: str) -> None:
    installed("unsloth", version if package == "unsloth" else "2026.10.9")
    if package != "unsloth":
        installed(package, version)
    rows = [item for item in check_packages(device) if item.name == package and item.verdict == "fail"]
    assert any(told in row.found and version in row.found for row in rows)
    assert all(row.fix and row.fix.startswith(f"pip install '{package}") for row in rows)


def test_what_breaks_on_a_cpu_only_is_not_told_on_a_card(installed: Dist) -> None:
    installed("trl", "1.15.0")
    assert not [item for item in check_packages("cuda") if item.name == "trl"]
    installed("unsloth", "2026.8.19")
    assert not [item for item in check_packages("cuda") if item.name == "unsloth"]


def test_the_tested_versions_are_in_no_row() -> None:
    pins = {requirement.name: requirement.specifier for requirement in read_tested_set() if requirement.marker is None}
    for row in KNOWN_BAD:
        for pin in pins.get(row.package, SpecifierSet()):
            if pin.operator == "==":
                assert not SpecifierSet(row.versions).contains(Version(pin.version)), row


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages.installed_version
    monkeypatch.setattr(packages, "installed_version", lambda name: None if name == "peft" else real(name))
    missing = next(item for item in check_packages("cpu") if item.verdict == "fail")
    assert missing.found == "not installed: peft" and missing.fix == "pip install 'peft==0.21.2'"


def test_gguf_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str] = {}
    monkeypatch.setattr(packages, "installed_version", versions.get)
    assert check_gguf().found.startswith("not installed: gguf (for every GGUF file), llama-cpp-python")
    versions |= {"gguf": "0.19.0", "llama-cpp-python": "0.3.36"}
    assert check_gguf() == Finding("GGUF export", "ok", "gguf 0.19.0, llama-cpp-python 0.3.36")
