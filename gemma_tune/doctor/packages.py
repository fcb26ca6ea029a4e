"""Installed versions against the set that is tested together, what they ask of each other, and pairs known to break.

All of it from package metadata: nothing is imported.
"""

import importlib.metadata
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import BaseSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from gemma_tune.doctor.finding import Finding
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.identity import installed_version
from gemma_tune.paths import PACKAGE_DIR, read_table

# The packages that reach into each other; what these ask of each other is checked.
STACK = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers", "huggingface-hub",
    "safetensors", *(canonicalize_name(name) for engine in ENGINES.values() for name in engine.packages),
)  # fmt: skip
_GGUF_EXTRAS = {"gguf": "every GGUF file", "llama-cpp-python": "K-quants and the check of a GGUF file"}
_NOT_FOR_USERS = {"dev"}


@dataclass(frozen=True)
class KnownBad:
    """Versions that are known to break."""

    package: str  # package, versions: what must not be installed; every version of `versions` counts
    versions: str
    because: str  # what happens, as measured or as published
    together_with: str | None = None  # another package that makes it break; None where it breaks alone
    on: Literal["cpu", "cuda"] | None = None  # only on this kind of device; None on both


KNOWN_BAD = [KnownBad(**row) for row in read_table("doctor/known_bad.toml")["known_bad"]]


def read_tested_set() -> list[Requirement]:
    """Our requirements, those of the extras with a marker: from pyproject.toml in a checkout, else from the metadata.

    The metadata of a checkout that was installed as editable is as old as its installation.
    """
    project = PACKAGE_DIR.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if table["name"] == "gemma-tune":
            lines = list(table["dependencies"])
            for extra, more in table["optional-dependencies"].items():
                lines += [f'{line}; extra == "{extra}"' for line in more if extra not in _NOT_FOR_USERS]
            return [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in map(Requirement, importlib.metadata.requires("gemma-tune") or ())
        if not any(f'"{extra}"' in str(requirement.marker) for extra in _NOT_FOR_USERS)
    ]


def installed_stack() -> dict[str, str]:
    """Name -> version of everything in the tested set and the stack that is installed."""
    names = {canonicalize_name(requirement.name) for requirement in read_tested_set()} | set(STACK)
    versions = {name: installed_version(name) for name in sorted(names)}
    return {name: version for name, version in versions.items() if version is not None}


def check_packages(device: str | None) -> list[Finding]:
    """The findings about versions; `device` is cpu, cuda, or None where it is not known."""
    tested, installed = read_tested_set(), installed_stack()
    bad = list(_known_bad(tested, installed, device))
    reported = {finding.name for finding in bad}
    return [
        *bad,
        *_missing(tested, installed),
        *_conflicts(tested, installed),
        _compare(tested, {name: version for name, version in installed.items() if name not in reported}),
    ]


def check_gguf() -> Finding:
    """Whether GGUF files can be written: the extras `gguf` and `gguf-quant`, which few need."""
    have = [f"{name} {version}" for name in _GGUF_EXTRAS if (version := installed_version(name))]
    lack = [f"{name} (for {use})" for name, use in _GGUF_EXTRAS.items() if installed_version(name) is None]
    found = "; ".join(filter(None, (", ".join(have), f"not installed: {', '.join(lack)}" if lack else "")))
    return Finding("GGUF export", "ok", found)


def install_command(tested: list[Requirement], names: Sequence[str]) -> str:
    """The pip command that brings these packages to their tested versions."""
    wanted: dict[str, Requirement] = {canonicalize_name(requirement.name): requirement for requirement in tested}
    parts = [
        f"'{name}{wanted[name].specifier}'" if name in wanted else name
        for name in dict.fromkeys(map(canonicalize_name, names))
    ]
    return f"pip install {' '.join(parts)}"


def _known_bad(tested: list[Requirement], installed: Mapping[str, str], device: str | None) -> Iterator[Finding]:
    for row in KNOWN_BAD:
        version = installed.get(row.package)
        if version is None or not _fits(version, SpecifierSet(row.versions)):
            continue
        if (row.together_with is None or row.together_with in installed) and row.on in (None, device):
            yield Finding(row.package, "fail", f"{version}: {row.because}", install_command(tested, [row.package]))


def _missing(tested: list[Requirement], installed: Mapping[str, str]) -> list[Finding]:
    names = [canonicalize_name(requirement.name) for requirement in tested if requirement.marker is None]
    missing = [name for name in names if name not in installed]
    if not missing:
        return []
    return [Finding("packages", "fail", f"not installed: {', '.join(missing)}", install_command(tested, missing))]


def _conflicts(tested: list[Requirement], installed: Mapping[str, str]) -> list[Finding]:
    """What an installed package of the stack asks of another, and does not get."""
    found, names = [], []
    for package in sorted(set(STACK) & set(installed)):
        for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
            name = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if name in STACK and name in installed and applies and not _fits(installed[name], requirement.specifier):
                broken = ",".join(str(part) for part in requirement.specifier if not _fits(installed[name], part))
                found.append(f"{package} asks for {name}{broken}, installed is {installed[name]}")
                names.append(name)
    if not found:
        return []
    return [Finding("package conflict", "fail", "; ".join(dict.fromkeys(found)), install_command(tested, names))]


def _compare(tested: list[Requirement], installed: Mapping[str, str]) -> Finding:
    num_present, found, names = 0, [], []
    for requirement in tested:
        name = canonicalize_name(requirement.name)
        version = installed.get(name)
        if version is None:
            continue
        num_present += 1
        if not _fits(version, requirement.specifier) and name not in names:
            found.append(f"{name} {version} (tested {requirement.specifier})")
            names.append(name)
    if not found:
        return Finding("packages", "ok", f"{num_present} installed, all in the tested versions")
    return Finding("packages", "warn", f"not as tested: {', '.join(found)}", install_command(tested, names))


def _fits(version: str, wanted: BaseSpecifier) -> bool:
    return wanted.contains(version, prereleases=True)
