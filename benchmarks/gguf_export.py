"""Exporting GGUF: every dtype that needs no compiler, q4_k_m where llama.cpp is installed, and `cp` as the floor.

    python benchmarks/gguf_export.py [--shape gemma-2b] [--layers 2] [--repeats 3] [--workdir DIR]

Makes a random checkpoint (bfloat16, sharded) with the embedded Gemma's tokenizer, then runs every way in a process of
its own. Seconds are those of the work inside the process (imports apart) with the output flushed to disk; peak memory
is that of the largest process, interpreter and imports included. llama.cpp maps its source into memory, and those pages
count. Best time and worst memory count. The name is not gguf.py, which would hide the package of that name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from merge import SHAPES, Measurement, make_base
from rich.console import Console
from rich.table import Table

from gemma_tune.paths import TINY_MODEL_DIR

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONVERTED = ("bf16", "f16", "q8_0", "f32")

# Each way is a program of its own: it prints its seconds and its peak in kilobytes (Linux) as JSON on its last line.
_PROGRAM = """
import json, os, resource, sys, time
from pathlib import Path
source, output = map(Path, sys.argv[1:])
{imports}
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({{"seconds": seconds, "peak_kb": peak_kb}}))
"""
_CP = """
subprocess.run(['cp', '-r', str(source), str(output)], check=True)
for path in output.iterdir():
    with path.open('rb+') as file:
        os.fsync(file.fileno())
"""
_CONVERT = """
import gguf, numpy
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
"""


def program(way: str) -> str:
    if way == "cp":
        return _PROGRAM.format(imports="import subprocess", work=_CP)
    if way in CONVERTED:
        work = f"convert_to_gguf(source, output / 'x.gguf', dtype={way!r}, provenance=GgufProvenance('x'))"
        return _PROGRAM.format(imports=_CONVERT, work=work)
    work = f"quantize_gguf(source.parent / 'bf16.gguf', output / 'x.gguf', quantization={way!r})"
    return _PROGRAM.format(imports="from gemma_tune.exporting.gguf.quantize import quantize_gguf", work=work)


def run(source: str, *arguments: Path) -> Measurement:
    repository = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", source, *map(str, arguments)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": repository},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arguments[-1]}: failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return Measurement(seconds=result["seconds"], peak_bytes=result["peak_kb"] * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gemma-2b")
    parser.add_argument("--layers", type=int, default=2, help="layers to make; the shape's own number with 0")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=None, help="where the files are made (a temporary directory)")
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape])
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    ways = ["cp", *CONVERTED, *(["q4_k_m"] if importlib.util.find_spec("llama_cpp") else [])]

    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="gguf-benchmark-") as scratch:
        source, output = Path(scratch) / "model", Path(scratch) / "output"
        # In a process of its own: a child's ru_maxrss starts at what its parent had resident when it was started.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_base, args=(source, shape), kwargs={"num_shards": arguments.shards}
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the checkpoint could not be made")
        for name in TOKENIZER_FILES:
            shutil.copyfile(TINY_MODEL_DIR / name, source / name)
        source_bytes = sum(path.stat().st_size for path in source.iterdir())
        if "q4_k_m" in ways:
            run(program("bf16"), source, output)
            (output / "x.gguf").rename(Path(scratch) / "bf16.gguf")
            output.rmdir()
        os.sync()
        runs: dict[str, list[Measurement]] = {way: [] for way in ways}
        written: dict[str, int] = {}
        for _ in range(arguments.repeats):  # in turns, so that a busy moment of the machine meets all ways
            for way in ways:
                runs[way].append(run(program(way), source, output))
                written[way] = sum(path.stat().st_size for path in output.iterdir())
                shutil.rmtree(output)

    best = {
        way: Measurement(min(m.seconds for m in done), max(m.peak_bytes for m in done)) for way, done in runs.items()
    }
    table = Table(
        title=f"GGUF: {arguments.shape}, {shape['num_hidden_layers']} layers, {source_bytes / 1e9:.2f} GB in bfloat16",
        caption=f"best of {arguments.repeats}; {os.cpu_count()} cores; q4_k_m from the bf16 file",
    )
    for column in ("way", "written (GB)", "seconds", "s/GB read", "peak memory (GB)", "time / cp"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, measured in best.items():
        table.add_row(
            way,
            f"{written[way] / 1e9:.2f}",
            f"{measured.seconds:.2f}",
            f"{measured.seconds / (source_bytes / 1e9):.2f}",
            f"{measured.peak_bytes / 1e9:.2f}",
            f"{measured.seconds / best['cp'].seconds:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
