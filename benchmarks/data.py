"""From rows in a file to packed token ids: ours, TRL's own preparation, and the tokenizer alone as the floor.

    python benchmarks/data.py [--rows 15000] [--repeats 3] [--rows-file FILE.jsonl] [--json FILE]

Every way runs in a process of its own, interleaved, on the same dolly-like rows with the tokenizer of the embedded
Gemma. Seconds are those of the work inside the process, imports and loading the tokenizer apart; peak memory is the
whole process's. Best time and worst memory count.

- `one tokenizer call`: `encode_batch_fast` of all prompts with their responses, the texts being in memory.
- `trl`: `load_dataset`, a map that fills the template, then `SFTTrainer._prepare_dataset` (tokenize, labels, pack bfd).
- `gemma-tune`: `open_inputs`, `build_datasets` without the cache, `pack_rows`.
- `gemma-tune, cached`: the same a second time, from the token cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagship import write_dolly_like_rows
from rich.console import Console
from rich.table import Table

from gemma_tune.machine.main_memory import peak_resident_bytes
from gemma_tune.paths import TINY_MODEL_DIR

MAX_SEQ_TOKENS = 2048


@dataclass(frozen=True)
class Measurement:
    """One way's best run.

    Attributes:
        seconds: of the work.
        peak_bytes: of the process.
        num_tokens: real tokens that came out.
        fill: real tokens of the packs' capacity; None where nothing is packed.
    """

    seconds: float
    peak_bytes: int
    num_tokens: int
    fill: float | None


def _texts(rows: Path) -> list[str]:
    lines = rows.read_text(encoding="utf-8").splitlines()
    return [_prompt(row) + row["response"] for row in map(json.loads, lines)]


def _prompt(row: dict[str, str]) -> str:
    """The dolly template, written out as a user of TRL would."""
    context = f"### Context:\n{row['context'].strip()}\n\n" if row["context"].strip() else ""
    return f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"


def one_call(rows: Path, cache: Path) -> Measurement:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY_MODEL_DIR / "tokenizer.json"))
    texts = _texts(rows)
    started = time.perf_counter()
    encoded = tokenizer.encode_batch_fast(texts)
    seconds = time.perf_counter() - started
    return Measurement(seconds, peak_resident_bytes(), sum(len(one.ids) for one in encoded), None)


def trl(rows: Path, cache: Path) -> Measurement:
    from types import SimpleNamespace

    import datasets
    from trl import SFTConfig, SFTTrainer

    from gemma_tune.models.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    # What `_prepare_dataset` reads of a trainer; a whole one would need a model.
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    config = SFTConfig(
        output_dir=str(cache / "trl"), max_length=MAX_SEQ_TOKENS, packing=True, report_to="none", use_cpu=True
    )
    started = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache / "datasets"))
    templated = loaded.map(
        lambda row: {"prompt": _prompt(row), "completion": row["response"]}, remove_columns=loaded.column_names
    )
    packed = SFTTrainer._prepare_dataset(trainer, templated, tokenizer, config, True, None, "train")
    seconds = time.perf_counter() - started
    lengths = [len(ids) for ids in packed["input_ids"]]
    return Measurement(seconds, peak_resident_bytes(), sum(lengths), sum(lengths) / (len(lengths) * MAX_SEQ_TOKENS))


def ours(rows: Path, cache: Path, *, cached: bool = False) -> Measurement:
    from gemma_tune.data.encode.encoder import Encoder
    from gemma_tune.data.encode.pack import pack_rows
    from gemma_tune.data.inputs import open_inputs
    from gemma_tune.data.open import build_datasets
    from gemma_tune.models.safetensors import tokenizer_hashes
    from gemma_tune.models.tokenizer import load_tokenizer
    from gemma_tune.recipe.schema import DataSection

    os.environ["GEMMA_TUNE_CACHE"] = str(cache / "ours")
    encoder = Encoder(load_tokenizer(TINY_MODEL_DIR))
    section = DataSection(
        source=str(rows), template="dolly", max_seq_tokens=MAX_SEQ_TOKENS, eval_fraction=0.0, cache=cached
    )

    def prepare() -> tuple[Any, list[tuple[int, ...]]]:
        made = build_datasets(
            section,
            open_inputs(section, prefers_chat=False),
            encoder,
            chat=None,
            tokenizer_files=tokenizer_hashes(TINY_MODEL_DIR),
        )
        return made, pack_rows(made.train.lengths, capacity=MAX_SEQ_TOKENS, seed=0, epoch=0)

    if cached:
        prepare()
    started = time.perf_counter()
    made, packs = prepare()
    seconds = time.perf_counter() - started
    return Measurement(
        seconds, peak_resident_bytes(), made.train.num_tokens, made.train.num_tokens / (len(packs) * MAX_SEQ_TOKENS)
    )


def ours_cached(rows: Path, cache: Path) -> Measurement:
    return ours(rows, cache, cached=True)


WAYS: dict[str, Callable[[Path, Path], Measurement]] = {
    "one tokenizer call": one_call,
    "trl": trl,
    "gemma-tune": ours,
    "gemma-tune, cached": ours_cached,
}


def _run(way: str, rows: Path, queue: Any) -> None:
    with tempfile.TemporaryDirectory() as cache:
        queue.put(WAYS[way](rows, Path(cache)))


def measure(rows: Path, *, repeats: int) -> dict[str, Measurement]:
    """Run every way `repeats` times, interleaved, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Measurement]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            queue = context.Queue()
            process = context.Process(target=_run, args=(way, rows, queue))
            process.start()
            found[way].append(queue.get())
            process.join()
    return {
        way: Measurement(
            seconds=min(run.seconds for run in runs),
            peak_bytes=max(run.peak_bytes for run in runs),
            num_tokens=runs[0].num_tokens,
            fill=runs[0].fill,
        )
        for way, runs in found.items()
    }


def to_table(found: dict[str, Measurement], *, num_rows: int) -> Table:
    peer = found["trl"].seconds
    table = Table(title=f"{num_rows:,} dolly-like rows, jsonl to packs of {MAX_SEQ_TOKENS:,} tokens")
    for column in ("way", "seconds", "times as fast as trl", "peak MB", "tokens", "fill"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, run in found.items():
        fill = "" if run.fill is None else f"{run.fill:.1%}"
        cells = (
            f"{run.seconds:.2f}",
            f"{peer / run.seconds:.2f}",
            f"{run.peak_bytes / 1e6:.0f}",
            f"{run.num_tokens:,}",
        )
        table.add_row(way, *cells, fill)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows-file", type=Path, help="dolly rows of your own instead of made ones")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = options.rows_file or Path(folder) / "rows.jsonl"
        if options.rows_file is None:
            tokenizer_file = TINY_MODEL_DIR / "tokenizer.json"
            write_dolly_like_rows(
                rows, options.rows, tokenizer_file=tokenizer_file, max_seq_tokens=MAX_SEQ_TOKENS, num_longest=8
            )
        found = measure(rows, repeats=options.repeats)
        num_rows = len(rows.read_text(encoding="utf-8").splitlines())
    Console().print(to_table(found, num_rows=num_rows))
    if options.json:
        options.json.write_text(
            json.dumps({way: asdict(run) for way, run in found.items()}, indent=2), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
