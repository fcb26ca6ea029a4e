"""LEAF. `python -m tools.tiny.make --out DIR` makes all of `gemma-tiny` again: DIR/model and DIR/rows.

About 35 minutes on 2 cores for the shipped weights; `--steps 20` makes a quick (and ignorant) one. The rows and the
tokenizer come out byte for byte the same everywhere, the weights where processor, thread count and torch are the same.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools.tiny.documents import iter_documents
from tools.tiny.pretrain import PretrainSettings, pretrain, write_model
from tools.tiny.questions import build_rows, write_rows
from tools.tiny.tokenizer import build_tokenizer, write_tokenizer
from tools.tiny.world import World, build_world

NUM_TOKENIZER_DOCUMENTS = 6000
TOKENIZER_SEED = 3


def tokenizer_texts(world: World) -> list[str]:
    """Return what the tokenizer is trained on: documents, and the wording (not the people) of the train questions."""
    documents = itertools.islice(iter_documents(world, seed=TOKENIZER_SEED), NUM_TOKENIZER_DOCUMENTS)
    # The wording is complete with these few; the shipped tokenizer and weights were made with them.
    train_rows, _ = build_rows(world, story_counts=(96, 80, 64))
    prompts = (f"### Instruction:\n{row.instruction}\n\n### Context:\n\n### Response:\n" for row in train_rows)
    return [*documents, *prompts]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make gemma-tiny (tokenizer, weights, rows) from its seeds.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model/ and rows/ into")
    parser.add_argument("--steps", type=int, default=PretrainSettings.num_steps, help="pre-training steps")
    parser.add_argument("--threads", type=int, default=PretrainSettings.num_threads, help="CPU threads")
    options = parser.parse_args(arguments)
    settings = replace(PretrainSettings(), num_steps=options.steps, num_threads=options.threads)
    world = build_world()
    write_rows(options.out / "rows", world=world)
    tokenizer = build_tokenizer(tokenizer_texts(world))
    write_tokenizer(tokenizer, options.out / "model")
    print(f"{len(world.people)} people, {len(tokenizer)} pieces; pre-training {settings.num_steps} steps", flush=True)
    model = pretrain(world, tokenizer, settings=settings, report=lambda line: print(line, flush=True))
    write_model(model, options.out / "model")
    print(f"done: {options.out}", flush=True)


if __name__ == "__main__":
    main()
