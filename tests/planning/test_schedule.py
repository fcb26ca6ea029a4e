"""Steps, and the arithmetic of a step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GemmaConfig

from gemma_tune.data.look.count import RowCount
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.machine.cards import CARDS, Card, find_card
from gemma_tune.models.config import check_config
from gemma_tune.planning.schedule import Schedule, pass_seconds, plan_schedule, step_operations
from gemma_tune.planning.step import Batch, Execution, Numerics, Step
from gemma_tune.recipe.schema import LoraSection, TrainingSection

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BF16 = Numerics(compute=2, stream=2, autocast=True)
UNSLOTH = Execution(ENGINES["unsloth"], "sdpa", "offload", "fused")
SHAPE = {
    "vocab_size": 640,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def test_operations_of_a_frozen_model() -> None:
    """Forward and the gradient of the input, no gradient of a weight: 4·N with the head, as PyTorch counts them."""
    torch.manual_seed(0)
    config = GemmaConfig(**SHAPE, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    rows, tokens = 2, 48
    inputs = torch.randn(rows, tokens, SHAPE["hidden_size"], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    # One adapter of rank 1 on one target is next to nothing. Full attention is counted here, half of it there.
    execution = Execution(ENGINES["transformers"], "eager", "off", "fused")
    planned = step_operations(
        check_config({"model_type": "gemma", **SHAPE}, "test"),
        Step(Batch(rows, tokens), BF16, LoraSection(rank=1, targets=("k_proj",)), execution),
        tokens=rows * tokens,
        row_tokens=2 * tokens,
    )
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)


def _schedule(*, counted: RowCount | None = None, card: Card | None = CARDS["l4"], **training: object) -> Schedule:
    settings = {"gradient_accumulation": 2, "epochs": 2.0, **training}
    return plan_schedule(
        check_config({"model_type": "gemma"}, "test"),
        Step(Batch(4, 1024), BF16, LoraSection(rank=16, targets=SEVEN), UNSLOTH),
        training=TrainingSection.model_validate(settings),
        counted=counted or RowCount(950, 200.0, "test"),
        card=card,
        processes=1,
    )


def test_steps_of_rows_and_of_packs() -> None:
    rows = _schedule()
    assert (rows.rows, rows.steps, rows.tokens) == (950, 238, 238 * 8 * 200)
    assert rows.seconds == pytest.approx(rows.steps * rows.seconds_per_step)
    packs = _schedule(packing=True)
    assert packs.steps == 47  # 950 · 2 · 200 tokens in steps of 8 · 1,024
    assert packs.seconds < rows.seconds
    assert _schedule(max_steps=20).steps == 20


def test_what_is_not_known_is_none() -> None:
    unknown = _schedule(counted=RowCount(None, None, "not known"))
    assert (unknown.steps, unknown.tokens, unknown.seconds) == (None, None, None)
    assert _schedule(counted=RowCount(None, None, "?"), max_steps=7).steps == 7
    assert _schedule(card=find_card("GB=24")).seconds is None
    assert _schedule(card=None).steps == 238


def test_recomputing_costs_time_and_a_faster_card_saves_it() -> None:
    config = check_config({"model_type": "gemma"}, "test")

    def seconds(name: str, checkpointing: str) -> float:
        execution = Execution(ENGINES["unsloth"], "sdpa", checkpointing, "fused")  # type: ignore[arg-type]
        step = Step(Batch(4, 1024), BF16, LoraSection(rank=16, targets=SEVEN), execution)
        taken = pass_seconds(config, step, card=CARDS[name], tokens=4096, row_tokens=1024)
        assert taken is not None
        return taken

    assert seconds("l4", "off") < seconds("l4", "on") < seconds("l4", "offload")
    assert seconds("h100", "on") < seconds("a100-40", "on") < seconds("l4", "on") < seconds("t4", "on")
