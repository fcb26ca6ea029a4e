"""Stand-ins that a probe's process finds before the real thing: modules, package metadata, nvidia-smi."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Stub = Callable[[str, str], None]
Dist = Callable[..., None]


@pytest.fixture
def stub_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Write a module that hides the installed one from the processes that are started."""
    folder = tmp_path / "modules"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    def write(name: str, source: str) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(source, encoding="utf-8")

    return write


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dist:
    """Pretend that a version of a package is installed, for this process and those that are started."""
    folder = tmp_path / "metadata"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    def pretend(name: str, version: str, *requires: str) -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return pretend


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an nvidia-smi first on the PATH that prints this."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(*, listed: str, shown: str, plan: str = "", code: int = 0) -> None:
        script = folder / "nvidia-smi"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$1" in *compute_cap*) echo "{plan}";; --query*) echo "{listed}";; *) echo "{shown}";; esac\n'
            f"exit {code}\n",
            encoding="utf-8",
        )
        script.chmod(0o755)

    return write


@pytest.fixture
def t4(stub_module: Stub, nvidia_smi: Callable[..., None]) -> None:
    """A Tesla T4 as its owner's machine shows it: PyTorch says yes to bfloat16."""
    stub_module("torch", torch_source("2.13.0+cu128", built_for="12.8", name="Tesla T4", capability=(7, 5)))
    nvidia_smi(
        listed="550.54.15, Tesla T4, 15360 MiB",
        shown="| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |",
        plan="Tesla T4, 15360, 7.5",
    )


def torch_source(
    version: str,
    *,
    built_for: str | None,
    name: str = "",
    capability: tuple[int, int] | None = None,
    architectures: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_90"),
    error: str = "",
) -> str:
    """A torch with as much of torch.cuda as the probe asks for; no capability: it finds no card."""
    return f"""
from types import SimpleNamespace as Space
__version__ = {version!r}
version = Space(cuda={built_for!r})
def _init():
    if {error!r}:
        raise RuntimeError({error!r})
_properties = Space(name={name!r}, major={(capability or (0, 0))[0]}, minor={(capability or (0, 0))[1]},
                    total_memory=15_828_320_256)
cuda = Space(
    init=_init,
    is_available=lambda: {capability is not None},
    device_count=lambda: {int(capability is not None)},
    get_arch_list=lambda: {list(architectures)!r},
    get_device_properties=lambda index: _properties,
    is_bf16_supported=lambda: True,
)
"""
