"""Rows without a tokenizer, steps, and the arithmetic of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GemmaConfig

from gemma_tune.engines.facts import ENGINES
from gemma_tune.machine.cards import CARDS, find_card
from gemma_tune.models.config import check_config
from gemma_tune.planning.memory import Adapter, Batch, Execution
from gemma_tune.planning.schedule import RowCount, count_rows, pass_seconds, plan_schedule, step_operations

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {index} of {path.name}", "response": "x" * 400} for index in range(count)]


def test_rows_of_every_plain_kind_of_file(tmp_path: Path) -> None:
    rows = _rows(tmp_path, 25)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    csv = tmp_path / "rows.csv"
    csv.write_text("instruction,response\n" + "".join(f"{row['instruction']},{row['response']}\n" for row in rows))
    for path in (jsonl, array, csv):
        counted = count_rows(str(path))
        assert counted.rows == 25, path
        assert counted.mean_tokens == pytest.approx(100, rel=0.25)
    assert count_rows(f"{jsonl}#7").rows == 7
    assert count_rows(f"{jsonl}#7").mean_tokens == count_rows(str(jsonl)).mean_tokens


def test_dolly_has_its_published_count() -> None:
    counted = count_rows("databricks/databricks-dolly-15k")
    assert counted.rows == 15_011
    assert counted.mean_tokens is not None and 150 < counted.mean_tokens < 250


@pytest.mark.parametrize("content", ["", "not json", "{}", "[]"])
def test_what_has_no_rows_is_not_known(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert count_rows(str(path)).rows is None
    assert count_rows("owner/some-dataset").rows is None
    assert count_rows(str(tmp_path / "missing.jsonl")).rows is None


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
        tokens=rows * tokens,
        row_tokens=2 * tokens,
        adapter=Adapter(1, ("k_proj",)),
        execution=execution,
    )
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)


def _schedule(**changes: object) -> object:
    options: dict[str, object] = {
        "card": CARDS["l4"],
        "counted": RowCount(1000, 200.0, "test"),
        "held_out": 50,
        "batch": Batch(4, 1024),
        "packed": False,
        "accumulation": 2,
        "processes": 1,
        "epochs": 2.0,
        "max_steps": None,
        "adapter": Adapter(16, SEVEN),
        "execution": UNSLOTH,
        "bits": "4bit",
    }
    return plan_schedule(check_config({"model_type": "gemma"}, "test"), **{**options, **changes})  # type: ignore[arg-type]


def test_steps_of_rows_and_of_packs() -> None:
    rows = _schedule()
    assert (rows.rows, rows.steps, rows.tokens) == (950, 238, 238 * 8 * 200)  # type: ignore[attr-defined]
    assert rows.seconds == pytest.approx(rows.steps * rows.seconds_per_step)  # type: ignore[attr-defined]
    packs = _schedule(packed=True)
    assert packs.steps == 47  # 950 · 2 · 200 tokens in steps of 8 · 1,024  # type: ignore[attr-defined]
    assert packs.seconds < rows.seconds  # type: ignore[attr-defined]
    assert _schedule(max_steps=20).steps == 20  # type: ignore[attr-defined]


def test_what_is_not_known_is_none() -> None:
    unknown = _schedule(counted=RowCount(None, None, "not known"))
    assert (unknown.steps, unknown.tokens, unknown.seconds) == (None, None, None)  # type: ignore[attr-defined]
    assert _schedule(counted=RowCount(None, None, "?"), max_steps=7).steps == 7  # type: ignore[attr-defined]
    assert _schedule(card=find_card("GB=24")).seconds is None  # type: ignore[attr-defined]
    assert _schedule(card=None).steps == 238  # type: ignore[attr-defined]


def test_recomputing_costs_time_and_a_faster_card_saves_it() -> None:
    config = check_config({"model_type": "gemma"}, "test")

    def seconds(name: str, checkpointing: str) -> float:
        taken = pass_seconds(
            config,
            card=CARDS[name],
            tokens=4096,
            row_tokens=1024,
            adapter=Adapter(16, SEVEN),
            execution=Execution(ENGINES["unsloth"], "sdpa", checkpointing, "fused"),  # type: ignore[arg-type]
            bits="4bit",
        )
        assert taken is not None
        return taken

    assert seconds("l4", "off") < seconds("l4", "on") < seconds("l4", "offload")
    assert seconds("h100", "on") < seconds("a100-40", "on") < seconds("l4", "on") < seconds("t4", "on")
