"""Two processes that share the optimizer's state train what one trains, and go on as they would have gone on."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.engines.table import choose_engine
from gemma_tune.errors import EngineError, TrainingStopped
from gemma_tune.machine.precision import Device
from gemma_tune.machine.world import World
from gemma_tune.recipe.rules import check_rules
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.training.state_file import read_state
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import (
    cut_after,
    recipe_of,
    require_equal_bits,
    require_same_training,
    train,
    weights,
)
from tests.training.two_processes import Task, run_together

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

# Of each process; one process has batches twice as large. The gradient is clipped at nearly every step.
EQUAL: dict[str, dict[str, Any]] = {
    "clipped": {"batch_size": 2, "eval_every": 3, "max_grad_norm": 0.05, "weight_decay": 0.1},
    "four bits, accumulated": {"batch_size": 1, "gradient_accumulation": 3, "four_bit": True},
    "packs without clipping": {"batch_size": 1, "packing": True, "pack_tokens": 40, "max_grad_norm": 0.0},
    "without a state": {"batch_size": 2, "optimizer": "sgd", "learning_rate": 0.5},
    "stopped early": {"batch_size": 2, "learning_rate": 0.3, "eval_every": 1, "early_stop_patience": 1},
}  # fmt: skip
RESUMED = {"batch_size": 1, "gradient_accumulation": 2, "dropout": 0.2, "four_bit": True, "log_every": 2}
NUM_ROWS, STEPS, CUT_AT = 13, 9, 5


def _zero(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"max_steps": STEPS, "data_parallel": "zero2", **settings, **more}


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("zero")
    tasks = [Task(name, NUM_ROWS, _zero(settings)) for name, settings in EQUAL.items()]
    saving = _zero(RESUMED, save_every_steps=1, keep_checkpoints=STEPS)
    run_together(base, output, [*tasks, Task("resumed", NUM_ROWS, saving)])
    return output


@needs_deepspeed
@pytest.mark.parametrize("name", EQUAL)
def test_they_equal_one_process_with_batches_twice_as_large(base: Path, runs: Path, tmp_path: Path, name: str) -> None:
    alone = _train_alone(base, tmp_path / "alone", EQUAL[name])
    require_same_training(RunDir(runs / name), alone)


def _train_alone(base: Path, directory: Path, settings: dict[str, Any], **more: Any) -> RunDir:
    doubled = {"max_steps": STEPS, **settings, "batch_size": 2 * settings["batch_size"], **more}
    rows = Rows(make_rows(NUM_ROWS, seed=7), make_rows(5, seed=8))
    return train(base, directory, rows=rows, recipe=recipe_of(**doubled))[0]


@needs_deepspeed
def test_a_checkpoint_has_the_state_of_one_process(base: Path, runs: Path, tmp_path: Path) -> None:
    alone = _train_alone(base, tmp_path / "alone", EQUAL["clipped"])
    expected, found = (
        read_state(run.checkpoints / f"checkpoint-{STEPS}", "training")["optimizer"]["state"]
        for run in (alone, RunDir(runs / "clipped"))
    )
    assert found.keys() == expected.keys()
    for number, values in expected.items():
        assert found[number].keys() == values.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            assert found[number][name].shape == value.shape
            assert torch.allclose(found[number][name], value, rtol=1e-3, atol=1e-6), (number, name)


@needs_deepspeed
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base: Path, runs: Path, tmp_path: Path) -> None:
    whole = RunDir(runs / "resumed")
    cut = cut_after(whole, tmp_path / "cut", step=CUT_AT)
    saving = _zero(RESUMED, save_every_steps=1, keep_checkpoints=STEPS)
    run_together(base, tmp_path, [Task("cut", NUM_ROWS, saving, resume=f"checkpoint-{CUT_AT}")])
    require_equal_bits(cut, whole)


@needs_deepspeed
def test_a_checkpoint_has_no_pickle(runs: Path) -> None:
    files = [path for path in (RunDir(runs / "resumed").checkpoints).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@needs_deepspeed
@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_both_before_the_step(base: Path, tmp_path: Path) -> None:
    exploding = {
        "batch_size": 2, "optimizer": "sgd", "learning_rate": 0.99, "max_grad_norm": 0.0, "lora": {"alpha": 10**6},
        "save_every_steps": 1,
    }  # fmt: skip
    with pytest.raises(TrainingStopped) as alone:
        _train_alone(base, tmp_path / "alone", copy.deepcopy(exploding))
    with pytest.raises(AssertionError) as together:
        run_together(base, tmp_path, [Task("together", NUM_ROWS, _zero(exploding))])
    assert "before they reached the weights" in str(alone.value)
    assert str(together.value).count(f"TrainingStopped: {alone.value}") == 2
    kept = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("alone", "together")]
    assert kept[0] == kept[1] != []


def test_one_process_trains_as_without_it(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(NUM_ROWS, seed=7), make_rows(5, seed=8))
    plain, zero = (
        train(base, tmp_path / mode, rows=rows, recipe=recipe_of(max_steps=2, data_parallel=mode), world=World())[0]
        for mode in ("ddp", "zero2")
    )
    expected = weights(plain)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights(zero).items())


def test_the_engine_is_transformers_and_deepspeed_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(data_parallel="zero2")
    l4, t4 = (Device("cuda", "a card", capability, 16_000_000_000) for capability in ((8, 9), (7, 5)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_engine(recipe.model, training=recipe.training, device=l4).name == "transformers"
    with pytest.raises(EngineError, match=r"zero2 does not scale the loss, which float16 needs"):
        choose_engine(recipe.model, training=recipe.training, device=t4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"deepspeed is not installed") as error:
        choose_engine(recipe.model, training=recipe.training, device=l4)
    assert "pip install 'gemma-tune[deepspeed]'" in str(error.value.hint)


def test_what_zero_is_not_proven_with_is_refused_by_name() -> None:
    settings = recipe_of(data_parallel="zero2", optimizer="adamw_8bit").model_dump()
    settings["model"] |= {"engine": "unsloth", "load_in_8bit": True}
    recipe = Recipe.model_validate(settings)
    assert [problem.path for problem in check_rules(recipe)] == [
        "model.engine", "model.load_in_8bit", "training.optimizer",
    ]  # fmt: skip
    assert not check_rules(recipe_of(data_parallel="zero2", early_stop_patience=2, eval_every=1))
