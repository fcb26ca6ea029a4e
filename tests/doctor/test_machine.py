"""Memory, disks and limits, on machines made of files."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from gemma_tune.doctor import machine
from gemma_tune.doctor.machine import (
    check_disks,
    check_limits,
    check_memory,
    check_python,
    check_shared_memory,
    used_places,
)

Usage = namedtuple("Usage", "total used free")


def _machine(root: Path, *, available_gb: float, files: dict[str, str] | None = None) -> Path:
    kib = int(available_gb * 1e9 / 1024)
    meminfo = f"MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: {kib} kB\nSwapTotal: 0 kB\nHugePages_Total: 0\n"
    for name, text in {"proc/meminfo": meminfo, **(files or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_python().verdict == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert check_python().verdict == "warn"


def test_the_memory_of_this_machine() -> None:
    found = check_memory().found
    total = psutil.virtual_memory().total
    assert f"of {total / 1e9:.1f} GB free" in found


@pytest.mark.parametrize(("available", "verdict"), [(20.0, "ok"), (4.0, "warn"), (1.5, "fail")])
def test_little_memory(tmp_path: Path, available: float, verdict: str) -> None:
    finding = check_memory(root=_machine(tmp_path, available_gb=available))
    assert (finding.verdict, finding.fix is None) == (verdict, verdict == "ok")
    assert "no swap" in finding.found


def test_a_recipe_that_needs_more_memory(tmp_path: Path) -> None:
    finding = check_memory(needed=25_000_000_000, root=_machine(tmp_path, available_gb=20.0))
    assert finding.verdict == "warn" and "about 25.0 GB needed" in finding.found


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/job/memory.max": "max\n",
         "sys/fs/cgroup/user/memory.max": "1500000000\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1500000000\n"},
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1500000000\n"},
    ],
    ids=["v2 above", "v2 container", "v1"],
)  # fmt: skip
def test_a_container_with_little_memory_on_a_large_machine(tmp_path: Path, files: dict[str, str]) -> None:
    finding = check_memory(root=_machine(tmp_path, available_gb=20.0, files=files))
    assert finding.verdict == "fail" and "this container may use 1.5 GB" in finding.found


def test_an_unlimited_container(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert "container" not in check_memory(root=_machine(tmp_path, available_gb=20.0, files=files)).found


def test_places_on_one_disk_are_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = used_places(str(tmp_path / "runs" / "not yet"), hub_cache=tmp_path / "hub", token_cache=tmp_path)
    free = 300 * 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    (finding,) = check_disks({name: path for name, path in places.items() if name != "temporary files"})
    assert finding.verdict == "ok" and finding.found == "300.0 GB free for runs, hub cache, token cache"
    free = 5 * 10**9
    (finding,) = check_disks({"hub cache": tmp_path})
    assert finding.verdict == "warn" and "Gemma 7B alone takes 17 GB" in finding.found
    (finding,) = check_disks({"hub cache": tmp_path}, needed={"hub cache": 4 * 10**9})
    assert finding.verdict == "ok" and finding.found == "5.0 GB free for hub cache; 4.0 GB needed"
    (finding,) = check_disks(
        {"hub cache": tmp_path, "runs": tmp_path}, needed={"hub cache": 4 * 10**9, "runs": 2 * 10**9}
    )
    assert finding.verdict == "fail" and "6.0 GB needed" in finding.found
    assert finding.fix == "free some space, or choose another disk: HF_HOME=DIR, run.output_dir=DIR"
    free = 10**8
    (finding,) = check_disks({"temporary files": tmp_path})
    assert finding.verdict == "fail" and finding.found.startswith("100 MB free")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    finding = check_disks({"token cache": tmp_path / "cache"})[0]
    assert finding.verdict == "fail" and finding.fix == "choose another folder: GEMMA_TUNE_CACHE=DIR"


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NPROC: (-1, -1), resource.RLIMIT_NOFILE: (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert check_limits(root=tmp_path).found == "unlimited processes, 1,024 open files"
    _machine(tmp_path, available_gb=1, files={"sys/fs/cgroup/pids.max": "100\n"})
    assert check_limits(root=tmp_path).verdict == "warn"
    limits[resource.RLIMIT_NPROC] = (32, 32)
    finding = check_limits(root=tmp_path)
    assert finding.verdict == "fail" and "32 processes" in finding.found and "ulimit -u" in (finding.fix or "")
    limits |= {resource.RLIMIT_NPROC: (-1, -1), resource.RLIMIT_NOFILE: (64, 64)}
    assert check_limits(root=tmp_path / "none").fix == "ulimit -n 4096"


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_shared_memory(tmp_path / "none") is None
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 0))
    finding = check_shared_memory(tmp_path)
    assert finding is not None and finding.verdict == "warn" and finding.fix == "docker run --shm-size=8g"
