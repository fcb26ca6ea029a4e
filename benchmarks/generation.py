"""200 questions answered one by one and in batches: seconds, tokens/s, and whether the greedy text is the same.

    python benchmarks/generation.py [--target gemma-tiny] [--questions 200] [--batch-sizes 8,32,64] [--repeats 2]

The questions are training rows of the embedded Gemma's world in the dolly template, answers at most 32 tokens. One
model in one process; the ways are interleaved, and the best time of each counts. Loading is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a shared machine's times worthless

from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.ask import encode_questions
from gemma_tune.inference.generate import Completion
from gemma_tune.inference.load_target import load_target
from gemma_tune.inference.target import find_target
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.terminal import Terminal, make_table

MAX_NEW_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="gemma-tiny", help="what `gemma-tune generate` takes")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--batch-sizes", default="8,32,64")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    with libraries_to(None):
        loaded = load_target(find_target(arguments.target, template="dolly"))
    rows = [dict(row.fields) for row in read_whole(open_source("tiny-world"))][: arguments.questions]
    prompts = encode_questions(loaded, rows)
    sizes = [1, *map(int, arguments.batch_sizes.split(","))]
    answers: dict[int, list[Completion]] = {}
    seconds: dict[int, float] = {}
    loaded.complete(prompts[:2], AnswerSettings(max_new_tokens=4))  # the first pass pays for what is made lazily
    for _ in range(arguments.repeats):
        for size in sizes:
            started = time.perf_counter()
            answers[size] = loaded.complete(prompts, AnswerSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=size))
            seconds[size] = min(seconds.get(size, float("inf")), time.perf_counter() - started)
    figures = []
    for size in sizes:
        num_tokens = sum(answer.num_tokens for answer in answers[size])
        figures.append(
            {
                "batch_size": size,
                "seconds": seconds[size],
                "tokens_per_second": num_tokens / seconds[size],
                "times_as_fast": seconds[1] / seconds[size],
                "equal_texts": sum(a.text == b.text for a, b in zip(answers[1], answers[size], strict=True)),
            }
        )
    terminal = Terminal()
    table = [
        (
            each["batch_size"],
            f"{each['seconds']:.2f}",
            f"{each['tokens_per_second']:,.0f}",
            f"{each['times_as_fast']:.1f}",
            f"{each['equal_texts']} of {len(prompts)}",
        )
        for each in figures
    ]
    columns = ("batch", "seconds", "tokens/s", "times as fast", "same text as one by one")
    terminal.result(make_table(columns, table, right=(0, 1, 2, 3, 4)))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures[-1]["times_as_fast"] >= 4 and figures[-1]["equal_texts"] == len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
