"""Time of an audit: `python benchmarks/audit.py [ROWS]`, without an argument 15,000 of dolly's lengths."""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Iterator

from gemma_tune.data.look.audit import AuditRow, audit_rows

# Words of dolly: the instruction, the context (of 30 % of the rows), the response.
_INSTRUCTION, _CONTEXT, _RESPONSE = 12, 220, 60
_WORDS = 20_000


def make_rows(count: int, *, seed: int = 0) -> Iterator[AuditRow]:
    """Invented words that are as unevenly frequent as English ones, 1 % of the rows almost copies."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 11))) for _ in range(_WORDS)]
    weights = [1 / (rank + 10) for rank in range(_WORDS)]

    def text(mean: int) -> str:
        chosen = draw.choices(words, weights, k=max(1, round(draw.gammavariate(2, mean / 2))))
        for at in range(12, len(chosen), 25):
            chosen[at] = f"{draw.randint(1, 99_999_999)}"
        for at in range(20, len(chosen), 40):
            chosen[at] += f".[{at}]"
        # A third of the texts has a character that is not ASCII: those are searched for mojibake.
        if draw.random() < 1 / 3:
            chosen[-1] += "é"
        return " ".join(chosen)

    last: tuple[str, str, str] = ("", "", "")
    for number in range(count):
        if number % 100 == 99:
            last = (last[0], last[1], f"{last[2]} more")
        else:
            last = (text(_INSTRUCTION), text(_CONTEXT) if draw.random() < 0.3 else "", text(_RESPONSE))
        if number % 200 == 0:
            last = (last[0], last[1], f"{last[2]} write to {words[number % _WORDS]}@example.com or +1 212 555 0123")
        instruction, context, response = last
        yield AuditRow(
            where=f"rows.jsonl:{number + 1}",
            side="eval" if number % 20 == 0 else "train",
            prompt=f"{instruction}\n{context}\n",
            response=response,
            key=hashlib.blake2b("\0".join(last).encode(), digest_size=16).digest(),
            texts=(("instruction", instruction), ("context", context), ("response", response)),
            category="open_qa",
            num_tokens=len(" ".join(last)) // 4,
            num_supervised=len(response) // 4,
            control_strings=0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="?", default=15_000)
    rows = list(make_rows(parser.parse_args().rows))
    characters = sum(len(text) for row in rows for _, text in row.texts)
    print(f"{len(rows):,} rows, {characters / 1e6:.1f} million characters")
    started = last = time.perf_counter()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total:
            now = time.perf_counter()
            print(f"  {what}: {now - last:.1f} s")
            last = now

    report = audit_rows(rows, bad=[], max_seq_tokens=1024, on_progress=tell)
    print(f"{time.perf_counter() - started:.1f} s in all")
    for found in report.findings:
        print(f"  {found.severity:8} {found.kind:16} {found.count:6,}")


if __name__ == "__main__":
    sys.exit(main())
