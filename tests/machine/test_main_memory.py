"""Memory of the machine and of its container."""

from __future__ import annotations

from pathlib import Path

from gemma_tune.machine.main_memory import peak_memory_bytes, read_memory

GROUP = "sys/fs/cgroup/user/job"


def test_a_container_leaves_its_limit_less_what_is_used_and_not_given_back(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": "0::/user/job\n",
        f"{GROUP}/memory.max": "8000000000",
        f"{GROUP}/memory.current": "6000000000",
        f"{GROUP}/memory.stat": "anon 3\nactive_file 500000000\ninactive_file 250000000\n",
        "sys/fs/cgroup/user/memory.max": "max",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    memory = read_memory(tmp_path)
    assert (memory.total, memory.available, memory.swap) == (64_000_000 * 1024, 2_750_000_000, 0)
    assert memory.limit == 8_000_000_000


def test_this_machine() -> None:
    memory = read_memory()
    assert memory.available is None or 10_000_000 < memory.available <= memory.total < 1 << 50
    assert 10_000_000 < peak_memory_bytes() < 1 << 50
