"""Steps, tokens and time of a run.

Time of a forward and backward pass = arithmetic / (peak rate · efficiency) + weights expanded / bandwidth + launches.

Operations a token, in units of the multiplied weights N (head counted apart): 2·N forward, 2·N for the gradient of the
input, 2·N again where the forward pass is recomputed. A frozen weight needs no gradient of its own, which is the 2·N
that separates QLoRA from the usual 6·N (arXiv:2001.08361, section 2.1). LoRA's own weights need all three.

The coefficients are fitted to one published table and to nothing else: LLaMA-Factory's wiki, "Performance comparison"
(April 2024), LLaMA 2 7B in 4 bits on an A100 40GB, 1,024 to 8,192 tokens. On other cards they are a guess; a run says
more after its first steps.
"""

import functools
import math
from dataclasses import dataclass

from gemma_tune.data.look.count import RowCount
from gemma_tune.machine.cards import Card
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import count_params, list_rows
from gemma_tune.planning.memory import count_trained
from gemma_tune.planning.step import Step
from gemma_tune.recipe.schema import TrainingSection

# What is left at 1,024 tokens after arithmetic and expansion, a layer: Python and kernel launches.
_LAUNCH_SECONDS = 0.002
# A 4-bit weight is read (0.5), written and read again in 16 bits (2 + 2) each time it is multiplied.
_EXPANDED_BYTES = {"4bit": 4.5, "8bit": 1.0, "plain": 2.0}
_BANDWIDTH_SHARE = 0.7
# Copying layer inputs to the host and back while computing; "2% ish" in Unsloth's own words (unsloth.ai/blog/gemma2).
_OFFLOAD_FACTOR = 1.02
# A factor to either side: nothing of this was measured on a card by us.
TIME_UNCERTAINTY = 2.0


@dataclass(frozen=True)
class Schedule:
    """A run in steps. None: not known before the data is read."""

    rows: int | None  # train rows, held-out ones left out
    mean_tokens: float | None
    rows_source: str
    steps: int | None
    tokens: int | None  # real tokens of the whole run
    seconds_per_step: float | None
    seconds: float | None  # of training, without loading, evaluation and answers


def step_operations(config: TextConfig, step: Step, *, tokens: float, row_tokens: float) -> float:
    """Count the floating-point operations of a forward and backward pass over `tokens` tokens in rows of `row_tokens`.

    Attention: 4·d·heads operations for each pair of tokens, half of them masked; twice that backward. The head is
    computed once more in TRL's checkpointed chunks, not in Unsloth's fused loss.
    """
    head = config.vocab_size * config.hidden_size
    linear = _count_multiplied(config)
    recomputes = 0 if step.execution.checkpointing == "off" else 1
    per_token: float = (4 + 2 * recomputes) * linear
    per_token += (4 if step.execution.head == "fused" else 6) * head
    per_token += (6 + 2 * recomputes) * count_trained(config, step.lora)
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
        math.prod(row.weight_shape) for row in list_rows(config) if row.kind == "Linear" and row.name != "lm_head"
    )
    a_layer = config.num_experts_per_token * 3 * config.expert_intermediate_size * config.hidden_size
    return linear + a_layer * len(config.layers)


def pass_seconds(config: TextConfig, step: Step, *, card: Card, tokens: float, row_tokens: float) -> float | None:
    """Estimate the seconds of a forward and backward pass; None for a card whose rates are not known."""
    if card.tera_flops is None or card.gigabytes_per_second is None:
        return None
    execution = step.execution
    operations = step_operations(config, step, tokens=tokens, row_tokens=row_tokens)
    arithmetic = operations / (card.tera_flops * 1e12 * execution.engine.peak_share)
    multiplications = 2 if execution.checkpointing == "off" else 3
    moved = count_params(config) * _EXPANDED_BYTES[step.bits] * multiplications
    expansion = moved / (card.gigabytes_per_second * 1e9 * _BANDWIDTH_SHARE)
    seconds = arithmetic + expansion + _LAUNCH_SECONDS * len(config.layers)
    return seconds * (_OFFLOAD_FACTOR if execution.checkpointing == "offload" else 1)


def plan_schedule(
    config: TextConfig, step: Step, *, training: TrainingSection, counted: RowCount, card: Card | None, processes: int
) -> Schedule:
    """Count steps and estimate the time. A batch of similar lengths has about its rows' own tokens; a pack is full.

    Args:
        counted: the rows that are trained on.
        processes: that share a step; what they say to each other is not counted.
    """
    batch, rows = step.batch, counted.rows
    passes = training.gradient_accumulation * processes  # of a step, in all processes
    row_tokens = None if counted.mean_tokens is None else min(counted.mean_tokens, batch.tokens)
    step_tokens = None
    if row_tokens is not None:
        step_tokens = passes * batch.rows * (batch.tokens if training.packing else row_tokens)
    steps = training.max_steps
    if steps is None and rows is not None and (row_tokens or not training.packing):
        per_step = step_tokens / row_tokens if training.packing and step_tokens and row_tokens else batch.rows * passes
        steps = max(math.ceil(rows * training.epochs / per_step), 1)
    seconds = None
    if card is not None and step_tokens is not None and row_tokens is not None:
        seconds = pass_seconds(config, step, card=card, tokens=step_tokens / passes, row_tokens=row_tokens)
    per_step_seconds = None if seconds is None else seconds * training.gradient_accumulation
    return Schedule(
        rows=rows,
        mean_tokens=row_tokens,
        rows_source=counted.source,
        steps=steps,
        tokens=None if steps is None or step_tokens is None else round(steps * step_tokens),
        seconds_per_step=per_step_seconds,
        seconds=None if steps is None or per_step_seconds is None else steps * per_step_seconds,
    )
