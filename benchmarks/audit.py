"""Time and memory of auditing rows and of leaving out near duplicates.

    python benchmarks/audit.py [ROWS] [--words 26] [--way audit|near]

ROWS (15,000) invented rows of --words words in the mean are written to a file; each way then reads them in a process of
its own with the tokenizer of the embedded Gemma. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from gemma_tune.recipe.schema import DataSection, Recipe

_VOCABULARY = 20_000


def make_rows(count: int, *, mean_words: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Invented words that are as unevenly frequent as English ones, 1 % of the rows almost copies."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 11))) for _ in range(_VOCABULARY)]
    sums = list(itertools.accumulate(1 / (rank + 10) for rank in range(_VOCABULARY)))

    def text(mean: float) -> str:
        chosen = draw.choices(words, cum_weights=sums, k=max(1, round(draw.gammavariate(2, mean / 2))))
        for at in range(12, len(chosen), 25):
            chosen[at] = f"{draw.randint(1, 99_999_999)}"
        for at in range(20, len(chosen), 40):
            chosen[at] += f".[{at}]"
        # A third of the texts has a character that is not ASCII: those are searched for mojibake.
        if draw.random() < 1 / 3:
            chosen[-1] += "é"
        return " ".join(chosen)

    # Parts as in dolly: the instruction, the context of 30 % of the rows, the response.
    last = ("", "", "")
    for number in range(count):
        if number % 100 == 99:
            last = (last[0], last[1], f"{last[2]} more")
        else:
            context = text(mean_words * 1.6) if draw.random() < 0.3 else ""
            last = (text(mean_words * 0.09), context, text(mean_words * 0.43))
        if number % 200 == 0:
            last = (
                last[0],
                last[1],
                f"{last[2]} write to {words[number % _VOCABULARY]}@example.com or +1 212 555 0123",
            )
        yield dict(zip(("instruction", "context", "response"), last, strict=True))


def audit(recipe: Recipe) -> None:
    """Audit the rows."""
    from gemma_tune.data.look.survey import audit_data

    started = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        if done == total:
            print(f"  {what} after {time.perf_counter() - started:.1f} s", flush=True)

    report = audit_data(recipe, reporter=SimpleNamespace(progress=progress))
    for found in report.findings:
        print(f"  {found.severity:8} {found.kind:16} {found.count:6,}")


def near(recipe: Recipe) -> None:
    """Read the rows without near duplicates, and encode them."""
    from gemma_tune.data.open import load_data, open_data

    base, inputs = open_data(recipe)
    print("  " + "\n  ".join(load_data(recipe, base=base, inputs=inputs)[2].report.lines()))


WAYS = {"audit": audit, "near": near}


def _run(way: str, rows: Path) -> None:
    section = DataSection(
        source=str(rows), template="dolly", max_seq_tokens=1024, cache=False, clean={"drop_duplicates": "near"}
    )
    started = time.perf_counter()
    WAYS[way](Recipe(data=section))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{way}: {time.perf_counter() - started:.1f} s, peak {peak / 1e6:,.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=15_000)
    parser.add_argument("--words", type=int, default=26)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in make_rows(options.rows, mean_words=options.words))
        print(f"{options.rows:,} rows, {path.stat().st_size / 1e6:.1f} MB", flush=True)
        for way in [options.way] if options.way else WAYS:
            process = multiprocessing.get_context("spawn").Process(target=_run, args=(way, path))
            process.start()
            process.join()


if __name__ == "__main__":
    sys.exit(main())
