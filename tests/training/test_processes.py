"""Two processes train what one trains, whole or in shares, and go on as they would have gone on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest
from gemma_tune.training.state_file import read_state
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import cut_after, recipe_of, require_equal_bits, require_same_training, train
from tests.training.two_processes import Task, run_together

# Of each process; one process has batches twice as large. 13 rows leave the second process short of some at the end of
# every epoch.
EQUAL: dict[str, dict[str, Any]] = {
    "batches of similar length": {"batch_size": 2, "eval_every": 3},
    "rows in any order, accumulated": {"batch_size": 1, "gradient_accumulation": 3, "group_by_length": False},
    "packs": {"batch_size": 1, "packing": True, "pack_tokens": 40},
    "four bits": {"batch_size": 2, "four_bit": True},
    "shares": {"batch_size": 2, "data_parallel": "fsdp", "eval_every": 3, "max_grad_norm": 0.05},
    "shares of four bits, accumulated": {
        "batch_size": 1, "gradient_accumulation": 2, "data_parallel": "fsdp", "four_bit": True,
    },
}  # fmt: skip
RESUMED: dict[str, dict[str, Any]] = {
    "whole": {"batch_size": 2, "dropout": 0.2, "eval_every": 3, "log_every": 2},
    "shares": {"batch_size": 2, "dropout": 0.2, "data_parallel": "fsdp", "four_bit": True},
}
NUM_ROWS, STEPS, CUT_AT = 13, 9, 5


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("together")
    run_together(
        base,
        output,
        [
            *(Task(name, NUM_ROWS, {"max_steps": STEPS, **settings}) for name, settings in EQUAL.items()),
            *(Task(f"resumed {name}", NUM_ROWS, _saving(settings)) for name, settings in RESUMED.items()),
        ],
    )
    return output


def _saving(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_steps": STEPS, "save_every_steps": 1, "keep_checkpoints": STEPS, **settings}


@pytest.mark.parametrize("name", EQUAL)
def test_they_equal_one_process_with_batches_twice_as_large(base: Path, runs: Path, tmp_path: Path, name: str) -> None:
    settings = {"max_steps": STEPS, **EQUAL[name]}
    settings["batch_size"] *= 2
    rows = Rows(make_rows(NUM_ROWS, seed=7), make_rows(5, seed=8))
    alone, _ = train(base, tmp_path / "alone", rows=rows, recipe=recipe_of(**settings))
    require_same_training(RunDir(runs / name), alone)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base: Path, runs: Path, tmp_path: Path, name: str) -> None:
    whole = RunDir(runs / f"resumed {name}")
    cut = cut_after(whole, tmp_path / "cut", step=CUT_AT)
    run_together(base, tmp_path, [Task("cut", NUM_ROWS, _saving(RESUMED[name]), resume=f"checkpoint-{CUT_AT}")])
    require_equal_bits(cut, whole)


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_whole_and_has_the_random_state_of_each(runs: Path, name: str) -> None:
    run = RunDir(runs / f"resumed {name}")
    checkpoint = run.checkpoints / f"checkpoint-{CUT_AT}"
    states = [read_state(checkpoint, f"process-{rank}")["random"] for rank in range(2)]
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
    moments = read_state(checkpoint, "training")["optimizer"]["state"]
    with safe_open(str(checkpoint / "adapter_model.safetensors"), framework="pt") as adapter:
        shapes = [tuple(adapter.get_slice(key).get_shape()) for key in adapter.keys()]  # noqa: SIM118
    assert sorted(tuple(state["exp_avg"].shape) for state in moments.values()) == sorted(shapes)
    assert read_manifest(run).step == STEPS
