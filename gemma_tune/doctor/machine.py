"""Python, memory, disks and the limits of this machine or container, from the operating system alone."""

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gemma_tune.disk import free_bytes, nearest_directory
from gemma_tune.doctor.finding import Finding, Verdict
from gemma_tune.machine.main_memory import container_limit, read_memory
from gemma_tune.text import format_bytes

_GB = 10**9
# Importing Unsloth and TRL takes about 1 GB; with gemma-tiny trained in it a process reaches 1.5 GB (measured).
_MIN_MEMORY = 2 * _GB
_LOW_MEMORY = 6 * _GB
# A run of gemma-tiny leaves about 50 MB; Gemma 2B's files are 5 GB, and 7B's 17 GB.
_MIN_DISK = 1 * _GB
_LOW_DISK = 20 * _GB
_MIN_PROCESSES = 64
_LOW_PROCESSES = 512
_MIN_OPEN_FILES = 256
# Docker's default is 64 MiB, which NCCL between several cards does not get along with.
_LOW_SHARED = 10**9
_UNLIMITED = 2**60
# How each place is moved.
_MOVES = {
    "runs": "run.output_dir=DIR",
    "hub cache": "HF_HOME=DIR",
    "token cache": "GEMMA_TUNE_CACHE=DIR",
    "temporary files": "TMPDIR=DIR",
}


def check_python() -> Finding:
    version = sys.version_info
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if (3, 11) <= version < (3, 14):
        return Finding("Python", "ok", found)
    return Finding("Python", "warn", f"{found}; tested are 3.11 to 3.13", "make an environment with Python 3.12")


def check_memory(*, needed: int = 0, root: Path = Path("/")) -> Finding:
    """Main memory, swap, and the limit of the container; less than `needed` bytes, a guess, is a warning."""
    memory = read_memory(root)
    available = memory.total if memory.available is None else memory.available
    swap = format_bytes(memory.swap) if memory.swap else "no"
    found = f"{format_bytes(available)} of {format_bytes(memory.total)} free, {swap} swap"
    if memory.limit is not None and memory.limit < memory.total:
        found += f"; this container may use {format_bytes(memory.limit)}"
        available = min(available, memory.limit)
    found += f"; about {format_bytes(needed)} needed" if needed else ""
    is_low = available < (needed or _LOW_MEMORY)
    verdict: Verdict = "fail" if available < _MIN_MEMORY else "warn" if is_low else "ok"
    fix = None if verdict == "ok" else "close other programs, or take a machine or container with more memory"
    return Finding("memory", verdict, found, fix)


def check_disks(places: Mapping[str, Path], *, needed: Mapping[str, int] | None = None) -> list[Finding]:
    """Free space at the places that are used, one finding a file system.

    `places` maps what it is for to a directory, which need not exist yet; `needed` to the bytes that a recipe writes.
    """
    systems: dict[int, list[str]] = {}
    findings = []
    for name, path in places.items():
        folder = nearest_directory(path)
        if not os.access(folder, os.W_OK):
            found = f"{path} ({name}) cannot be written to"
            findings.append(Finding("disk", "fail", found, f"choose another folder: {_MOVES[name]}"))
        systems.setdefault(folder.stat().st_dev, []).append(name)
    for names in systems.values():
        free = free_bytes(places[names[0]])
        wanted = sum((needed or {}).get(name, 0) for name in names)
        found = f"{format_bytes(free)} free for {', '.join(names)}"
        found += f"; {format_bytes(wanted)} needed" if wanted else ""
        verdict: Verdict = "ok"
        if free < max(_MIN_DISK, wanted):
            verdict = "fail"
        elif free < _LOW_DISK and not wanted:
            verdict, found = "warn", f"{found}; Gemma 7B alone takes 17 GB"
        moves = ", ".join(_MOVES[name] for name in names)
        fix = None if verdict == "ok" else f"free some space, or choose another disk: {moves}"
        findings.append(Finding("disk", verdict, found, fix))
    return findings


def check_limits(*, root: Path = Path("/")) -> Finding:
    """How many processes and open files this user or container may have."""
    processes = min(
        _unlimited(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        _unlimited(container_limit(root, "pids.max", "pids/pids.max") or -1),
    )
    files = _unlimited(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    found = f"{_count(processes)} processes, {_count(files)} open files"
    if processes < _LOW_PROCESSES:
        verdict: Verdict = "fail" if processes < _MIN_PROCESSES else "warn"
        fix = "ulimit -u 4096, or docker run --pids-limit 4096"
        return Finding("limits", verdict, f"{found}; each library starts threads", fix)
    if files < _MIN_OPEN_FILES:
        return Finding("limits", "warn", found, "ulimit -n 4096")
    return Finding("limits", "ok", found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding | None:
    """Shared memory, which several processes on one machine talk through; None where the system has no such folder."""
    if not folder.is_dir():
        return None
    total = shutil.disk_usage(folder).total
    if total >= _LOW_SHARED:
        return Finding("shared memory", "ok", format_bytes(total))
    found = f"{format_bytes(total)}: enough for one card, too little for training on several"
    return Finding("shared memory", "warn", found, "docker run --shm-size=8g")


def used_places(output_dir: str, *, hub_cache: Path, token_cache: Path) -> dict[str, Path]:
    """Where runs, downloads and temporary files go."""
    return {
        "runs": Path(output_dir).expanduser(),
        "hub cache": hub_cache,
        "token cache": token_cache,
        "temporary files": Path(tempfile.gettempdir()),
    }


def _unlimited(number: int) -> int:
    return _UNLIMITED if number < 0 else number


def _count(number: int) -> str:
    return "unlimited" if number >= _UNLIMITED else f"{number:,}"
