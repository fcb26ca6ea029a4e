"""Main memory: what this machine and its container have and leave free, and what a process took."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60


@dataclass(frozen=True)
class MainMemory:
    """Main memory, in bytes."""

    total: int  # of the machine
    available: int | None  # what can be had without swapping, in the container, too; None where the system does not say
    swap: int  # of the machine
    limit: int | None  # what the container may use, or None where it may use all


def read_memory(root: Path = Path("/")) -> MainMemory:
    """Read the memory of this machine and container; `root` holds proc and sys."""
    facts = _read_facts(root / "proc" / "meminfo", unit=1024)
    available = facts.get("MemAvailable")
    if available is not None:
        available = min([available, *_left_in_groups(root)])
    limit = container_limit(root, "memory.max", "memory/memory.limit_in_bytes")
    total = facts.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MainMemory(total, available, facts.get("SwapTotal", 0), limit)


def container_limit(root: Path, name: str, name_v1: str) -> int | None:
    """Return the tightest limit of a control group, version 2 (the own group and those above it) or 1."""
    groups = root / "sys" / "fs" / "cgroup"
    paths = [*(group / name for group in _own_groups(root)), groups / name_v1]
    return min(filter(None, map(_read_limit, paths)), default=None)


def peak_memory_bytes() -> int:
    """Return the peak memory allocated on the card, or resident in this process where there is none."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak memory that was resident in this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what each control group with a limit has left. Cached files count as used there, and are given back."""
    for group in _own_groups(root):
        limit = _read_limit(group / "memory.max")
        if limit is not None:
            stat = _read_facts(group / "memory.stat")
            cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)
            yield limit - (_read_limit(group / "memory.current") or 0) + cached


def _own_groups(root: Path) -> list[Path]:
    """Return the folder of the control group that this process is in, and of those above it."""
    groups, membership = root / "sys" / "fs" / "cgroup", root / "proc" / "self" / "cgroup"
    own = ""
    if membership.is_file():
        for line in membership.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("0::"):
                own = line.removeprefix("0::").strip("/")
    folder = groups / own
    return [path for path in (folder, *folder.parents) if path.is_relative_to(groups)]


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _read_facts(path: Path, *, unit: int = 1) -> dict[str, int]:
    """Read a file of `name value` lines, as the kernel writes them; empty where there is none."""
    if not path.is_file():
        return {}
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * unit for words in pairs if len(words) > 1}
