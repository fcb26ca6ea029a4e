"""SIGKILL at random moments of a merge, of a 4-bit export and of a GGUF export: what has the final name must be whole.

    python benchmarks/export_kill.py [--kills 20] [--ways merge merged-4bit gguf] [--layers 24] [--seed 0]

An uninterrupted export comes first; its hashes are the reference and its seconds the span in which the kills fall.
After each kill the final name must be absent or equal the reference; the same command is then run again and must
complete, equal the reference byte for byte, and leave nothing beside it. Exits with 1 when one of these did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from merge import make_inputs
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_MODEL = REPOSITORY / "gemma_tune" / "models" / "tiny" / "model"
# Rows and tokenizer of gemma-tiny, because a GGUF needs a tokenizer; the rest wide enough to last some seconds.
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 2304,
}

# Each way is a program of its own; it says when it begins, so that no kill is wasted on imports.
_PROGRAMS = {
    "merge": """
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.exporting.export_settings import ExportSettings
begin()
merge_adapter(base, adapter, output, settings=ExportSettings(max_shard_bytes=30_000_000))
""",
    "merged-4bit": """
from gemma_tune.exporting.merge.quantize_nf4 import quantize_merged
begin()
quantize_merged(merged, output, max_shard_bytes=10_000_000)
""",
    "gguf": """
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
begin()
convert_to_gguf(merged, output, dtype="bf16", provenance=GgufProvenance(name="random", base_model="random"))
""",
}
_PRELUDE = """
import sys
from pathlib import Path
base, adapter, merged, output = map(Path, sys.argv[1:])
def begin():
    print("begin", flush=True)
"""


@dataclass(frozen=True)
class Inputs:
    """What is exported; `merged` is made by an uninterrupted merge."""

    base: Path
    adapter: Path
    merged: Path


@dataclass
class Counts:
    """What happened over all kills of one way.

    `too_late` are exports that had ended before their kill, which are no kills; `absent`, `whole` and `broken` are what
    had the final name after the kill; `went_on` counts second runs that kept files of the killed one, `completed` the
    kills that ended in a whole output.
    """

    killed: int = 0
    too_late: int = 0
    absent: int = 0
    whole: int = 0
    broken: int = 0
    went_on: int = 0
    completed: int = 0


def start(way: str, inputs: Inputs, output: Path) -> subprocess.Popen[str]:
    """Start an export; returns once it has begun."""
    paths = [str(path) for path in (inputs.base, inputs.adapter, inputs.merged, output)]
    command = [sys.executable, "-c", _PRELUDE + _PROGRAMS[way], *paths]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "begin":
        raise SystemExit(f"{way} did not begin:\n{process.communicate()[1][-3000:]}")
    return process


def run(way: str, inputs: Inputs, output: Path) -> float:
    """Export without a kill; returns the seconds from its beginning until the output has its name."""
    with start(way, inputs, output) as process:
        started = time.perf_counter()
        while process.poll() is None and not output.exists():
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{way} failed:\n{errors[-3000:]}")
    return seconds


def hashes(output: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of a directory's files, or of the one file."""
    files = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stamps(directory: Path) -> set[tuple[str, int, int]]:
    """Name, inode and time of change of every file: the same afterwards means that it was not written again."""
    found = ((path.name, path.stat()) for path in directory.rglob("*") if path.is_file())
    return {(name, status.st_ino, status.st_mtime_ns) for name, status in found}


def kill_and_run_again(
    way: str, inputs: Inputs, output: Path, *, delay_seconds: float, reference: dict[str, str], counts: Counts
) -> None:
    with start(way, inputs, output) as process:
        time.sleep(delay_seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if process.returncode != -signal.SIGKILL:
        counts.too_late += 1
        return
    counts.killed += 1
    if output.exists():
        is_whole = hashes(output) == reference
        counts.whole += is_whole
        counts.broken += not is_whole
        counts.completed += is_whole
        return
    counts.absent += 1
    left = output.parent / f".{output.name}.partial"
    before = stamps(left) if left.is_dir() else set()
    run(way, inputs, output)
    counts.went_on += output.is_dir() and bool(before & stamps(output))
    counts.completed += hashes(output) == reference and list(output.parent.iterdir()) == [output]


def measure(way: str, inputs: Inputs, scratch: Path, *, kills: int, generator: random.Random) -> tuple[Counts, float]:
    reference_output = scratch / f"{way}-reference" / "output"
    seconds = run(way, inputs, reference_output)
    reference = hashes(reference_output)
    shutil.rmtree(reference_output.parent)
    counts, span_seconds = Counts(), seconds
    while counts.killed < kills:
        output = scratch / f"{way}-{counts.killed + counts.too_late}" / "output"
        delay = generator.uniform(0.0, span_seconds)
        too_late = counts.too_late
        kill_and_run_again(way, inputs, output, delay_seconds=delay, reference=reference, counts=counts)
        if counts.too_late > too_late:
            span_seconds = delay  # the machine was busier when the reference was made
        shutil.rmtree(output.parent)
    return counts, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=sorted(_PROGRAMS), default=list(_PROGRAMS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=None, help="where the files are made (a temporary directory)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="export-kill-") as name:
        scratch = Path(name)
        inputs = Inputs(scratch / "base", scratch / "adapter", scratch / "merged")
        shape = SHAPE | {"num_hidden_layers": arguments.layers}
        make_inputs(inputs.base, inputs.adapter, shape, num_shards=3, rank=16)
        for path in TINY_MODEL.glob("token*.json"):
            shutil.copy(path, inputs.base)
        run("merge", inputs, inputs.merged)
        num_bytes = sum(path.stat().st_size for path in inputs.merged.iterdir())
        generator = random.Random(arguments.seed)
        table = Table(title=f"{arguments.kills} kills of each, a model of {num_bytes / 1e9:.2f} GB")
        columns = ("way", "seconds", "killed", "too late", "absent", "whole", "broken", "went on", "completed")
        for column in columns:
            table.add_column(column, justify="left" if column == "way" else "right")
        failed = False
        for way in arguments.ways:
            counts, seconds = measure(way, inputs, scratch, kills=arguments.kills, generator=generator)
            table.add_row(way, f"{seconds:.2f}", *(str(count) for count in vars(counts).values()))
            failed |= counts.broken > 0 or counts.completed < arguments.kills
    Console().print(table)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
