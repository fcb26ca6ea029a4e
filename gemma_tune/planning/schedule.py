"""Steps, tokens and time of a run.

Time of a forward and backward pass = arithmetic / (peak rate · efficiency) + weights expanded / bandwidth + launches.

Operations a token, in units of the multiplied weights N (head counted apart): 2·N forward, 2·N for the gradient of the
input, 2·N again where the forward pass is recomputed. A frozen weight needs no gradient of its own, which is the 2·N
that separates QLoRA from the usual 6·N (arXiv:2001.08361, section 2.1). LoRA's own weights need all three.

The coefficients are fitted to one published table and to nothing else: LLaMA-Factory's wiki, "Performance comparison"
(April 2024), LLaMA 2 7B in 4 bits on an A100 40GB, 1,024 to 8,192 tokens. On other cards they are a guess; a run says
more after its first steps.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.machine.cards import Card
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import summarize
from gemma_tune.planning.memory import Adapter, Batch, Bits, Execution, count_all, count_trained

# What is left at 1,024 tokens after arithmetic and expansion, a layer: Python and kernel launches.
_LAUNCH_SECONDS = 0.002
# A 4-bit weight is read (0.5), written and read again in 16 bits (2 + 2) each time it is multiplied.
_EXPANDED_BYTES = {"4bit": 4.5, "8bit": 1.0, "plain": 2.0}
_BANDWIDTH_SHARE = 0.7
# Copying layer inputs to the host and back while computing; "2% ish" in Unsloth's own words (unsloth.ai/blog/gemma2).
_OFFLOAD_FACTOR = 1.02
# Bytes of UTF-8 text a token of Gemma's 256,000-entry vocabulary: English prose. Other languages and code differ.
_BYTES_PER_TOKEN = 4.2
# A row of JSON has its keys, quotes and escapes beside its text.
_TEXT_SHARE = 0.9
# A factor to either side: nothing of this was measured on a card by us.
TIME_UNCERTAINTY = 2.0

_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RowCount:
    """Rows of a source, their mean length in tokens, and where both come from. None: not known without a download."""

    rows: int | None
    mean_tokens: float | None
    source: str


@dataclass(frozen=True)
class Schedule:
    """A run in steps. None: not known before the data is read.

    Attributes:
        rows: train rows, held-out ones left out.
        tokens: real tokens of the whole run.
        seconds: of training, without loading, evaluation and answers.
    """

    rows: int | None
    mean_tokens: float | None
    rows_source: str
    steps: int | None
    tokens: int | None
    seconds_per_step: float | None
    seconds: float | None


# Rows and bytes of the jsonl file, as the dataset's page on the hub states them.
PUBLISHED_ROWS = {"databricks/databricks-dolly-15k": (15_011, 13_100_000)}


def count_rows(source: str, *, directory: Path = Path()) -> RowCount:
    """Rows and mean tokens of a source without a tokenizer: lines and bytes of a local file, or published figures.

    `source` is one of a recipe's, with `#N` for a number of rows.
    """
    name, _, wanted = source.partition("#")
    path = directory / name
    if name.lower() in PUBLISHED_ROWS:
        rows, size = PUBLISHED_ROWS[name.lower()]
        counted = RowCount(rows, _mean_tokens(size, rows), "the dataset's page")
    elif path.is_file() and path.suffix.lower() in (".jsonl", ".csv", ".tsv", ".json"):
        counted = _count_file(path)
    else:
        counted = RowCount(None, None, "not known before the data is read")
    return RowCount(int(wanted), counted.mean_tokens, f"{name}#{wanted}") if wanted.isdigit() else counted


def _count_file(path: Path) -> RowCount:
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix == ".json":
        if size > _MAX_JSON_BYTES:
            return RowCount(None, None, "not known before the data is read")
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            content = None
        rows = len(content) if isinstance(content, list) else 0
    else:
        with path.open("rb") as file:
            rows = sum(1 for line in file if line.strip()) - (suffix != ".jsonl")
    if rows < 1:
        return RowCount(None, None, "not known before the data is read")
    return RowCount(rows, _mean_tokens(size, rows), f"{path.name}: lines and bytes")


def _mean_tokens(size: int, rows: int) -> float:
    return size * _TEXT_SHARE / rows / _BYTES_PER_TOKEN


def step_operations(
    config: TextConfig, *, tokens: float, row_tokens: float, adapter: Adapter, execution: Execution
) -> float:
    """Floating-point operations of a forward and backward pass over `tokens` tokens in rows of `row_tokens`.

    Attention: 4·d·heads operations for each pair of tokens, half of them masked; twice that backward. The head is
    computed once more in TRL's checkpointed chunks, not in Unsloth's fused loss.
    """
    head = config.vocab_size * config.hidden_size
    linear = _count_multiplied(config)
    recomputes = 0 if execution.checkpointing == "off" else 1
    per_token: float = (4 + 2 * recomputes) * linear
    per_token += (4 if execution.head == "fused" else 6) * head
    per_token += (6 + 2 * recomputes) * count_trained(config, adapter)
    for layer in config.layers:
        reach = row_tokens
        if layer.attention == "sliding" and config.sliding_window is not None:
            reach = min(reach, 2 * config.sliding_window)
        per_token += (3 + recomputes) * 2 * layer.head_dim * config.num_heads * reach
    return tokens * per_token


@functools.cache
def _count_multiplied(config: TextConfig) -> int:
    """Weights that a token is multiplied with, the head left out; of experts only those that it goes to."""
    linear = sum(
        math.prod(row.weight_shape) for row in summarize(config) if row.kind == "Linear" and row.name != "lm_head"
    )
    a_layer = config.num_experts_per_token * 3 * config.expert_intermediate_size * config.hidden_size
    return linear + a_layer * len(config.layers)


def pass_seconds(
    config: TextConfig,
    *,
    card: Card,
    tokens: float,
    row_tokens: float,
    adapter: Adapter,
    execution: Execution,
    bits: Bits,
) -> float | None:
    """Seconds of a forward and backward pass; None for a card whose rates are not known."""
    if card.tera_flops is None or card.gigabytes_per_second is None:
        return None
    operations = step_operations(config, tokens=tokens, row_tokens=row_tokens, adapter=adapter, execution=execution)
    arithmetic = operations / (card.tera_flops * 1e12 * execution.engine.peak_share)
    multiplications = 2 if execution.checkpointing == "off" else 3
    moved = count_all(config) * _EXPANDED_BYTES[bits] * multiplications
    expansion = moved / (card.gigabytes_per_second * 1e9 * _BANDWIDTH_SHARE)
    seconds = arithmetic + expansion + _LAUNCH_SECONDS * len(config.layers)
    return seconds * (_OFFLOAD_FACTOR if execution.checkpointing == "offload" else 1)


def plan_schedule(
    config: TextConfig,
    *,
    card: Card | None,
    counted: RowCount,
    held_out: int,
    batch: Batch,
    packed: bool,
    accumulation: int,
    processes: int,
    epochs: float,
    max_steps: int | None,
    adapter: Adapter,
    execution: Execution,
    bits: Bits,
) -> Schedule:
    """Steps and time. A batch of similar lengths has about its rows' own tokens; a pack is full.

    Args:
        held_out: rows that evaluation takes away from training.
        processes: that share a step; what they say to each other is not counted.
    """
    passes = accumulation * processes  # of a step, in all processes
    rows = None if counted.rows is None else max(counted.rows - held_out, 1)
    row_tokens = None if counted.mean_tokens is None else min(counted.mean_tokens, batch.tokens)
    step_tokens = None if row_tokens is None else passes * batch.rows * (batch.tokens if packed else row_tokens)
    steps = max_steps
    if steps is None and rows is not None:
        if packed:
            per_step = None if row_tokens is None else step_tokens / row_tokens if step_tokens else None
        else:
            per_step = batch.rows * passes
        steps = None if per_step is None else max(math.ceil(rows * epochs / per_step), 1)
    seconds = None
    if card is not None and step_tokens is not None and row_tokens is not None:
        seconds = pass_seconds(
            config,
            card=card,
            tokens=step_tokens / passes,
            row_tokens=row_tokens,
            adapter=adapter,
            execution=execution,
            bits=bits,
        )
    per_step_seconds = None if seconds is None else seconds * accumulation
    return Schedule(
        rows=rows,
        mean_tokens=row_tokens,
        rows_source=counted.source,
        steps=steps,
        tokens=None if steps is None or step_tokens is None else round(steps * step_tokens),
        seconds_per_step=per_step_seconds,
        seconds=None if steps is None or per_step_seconds is None else steps * per_step_seconds,
    )
