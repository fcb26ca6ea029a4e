"""A training that would be lost is stopped before weights or checkpoints take harm, and never ends as if well."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.engines.base import LoadSettings
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.errors import TrainingStopped
from gemma_tune.machine.precision import Precision
from gemma_tune.machine.world import World
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import SilentReporter
from gemma_tune.training.adapter_weights import trained_weights
from gemma_tune.training.guards import MAX_FP16_OVERFLOWS, GuardCallback, find_non_finite
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import attach, losses, recipe_of, save_base, train, weights

ROWS = Rows(make_rows(8, seed=9), make_rows(4, seed=8))


def all_finite(run: RunDir) -> bool:
    files = [*run.checkpoints.glob("*/*.safetensors"), *run.adapter.glob("*.safetensors")]
    return all(
        bool(torch.isfinite(tensor).all())
        for file in files
        for tensor in load_file(file).values()
        if tensor.is_floating_point()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_base_that_is_not_finite_is_stopped_before_the_first_step(
    tmp_path: Path, value: float, load_in_4bit: bool
) -> None:
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.model_validate({**recipe_of().model_dump(), "model": {"load_in_4bit": load_in_4bit}})
    with pytest.raises(
        TrainingStopped, match=r"before the first step the loss of the longest rows is (nan|inf)"
    ) as told:
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe)
    assert "layers.1.mlp.gate_proj" in (told.value.hint or "")
    assert not (tmp_path / "r" / "adapter").exists()


def test_a_nan_that_only_eval_rows_reach_is_stopped_before_the_first_step(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    only_eval = min(set(ROWS.eval.token_ids.tolist()) - set(ROWS.train.token_ids.tolist()))
    with torch.no_grad():
        model.model.embed_tokens.weight[only_eval] = math.nan
    model.save_pretrained(base)
    with pytest.raises(TrainingStopped, match=r"after step 0 the loss of the eval rows is nan") as told:
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of())
    assert "embed_tokens.weight holds NaN" in (told.value.hint or "")


def test_one_step_trains(base: Path, tmp_path: Path) -> None:
    run, result = train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of(max_steps=1))
    assert result.steps == 1 and [row["learning_rate"] for row in read_metrics(run)] == [1e-2]
    assert max(float(weight.abs().max()) for name, weight in weights(run).items() if "lora_B" in name) > 0


def test_an_adapter_that_no_step_moved_is_not_called_finished(base: Path, tmp_path: Path) -> None:
    # Without momentum a step is rate times gradient, here below the smallest number that float32 holds.
    recipe = recipe_of(max_steps=2, learning_rate=1e-60, optimizer="sgd")
    with pytest.raises(TrainingStopped, match=r"after step 2 the adapter is as it began"):
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe)
    assert not RunDir(tmp_path / "r").adapter.exists()


def test_a_best_checkpoint_that_no_step_moved_is_kept_and_said(base: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Told(SilentReporter):
        def warn(self, text: str) -> None:
            told.append(text)

    still = {"learning_rate": 1e-60, "optimizer": "sgd", "max_steps": 3, "eval_every": 1}
    recipe = recipe_of(**still, early_stop_patience=3)
    run, _ = train(base, tmp_path / "r", rows=ROWS, recipe=recipe, reporter=Told())
    assert run.adapter.is_dir()
    assert [text[:41] for text in told if "as it began" in text] == ["the best checkpoint, of step 1, is the ad"]
    with pytest.raises(TrainingStopped, match=r"after step 3 the adapter is as it began"):
        train(base, tmp_path / "last", rows=ROWS, recipe=recipe_of(**still))


def test_a_resumed_run_that_no_step_moved_is_not_called_finished(base: Path, tmp_path: Path) -> None:
    still = {"learning_rate": 1e-60, "optimizer": "sgd", "save_every_steps": 1}
    for steps, resume_from in ((2, None), (3, tmp_path / "r" / "checkpoints" / "checkpoint-2")):
        with pytest.raises(TrainingStopped, match=rf"after step {steps} the adapter is as it began"):
            recipe = recipe_of(**still, max_steps=steps)
            train(base, tmp_path / "r", rows=ROWS, recipe=recipe, resume_from=resume_from)


@pytest.mark.parametrize("learning_rate", [1e3, 1e30])
def test_an_absurd_learning_rate_is_stopped_with_good_checkpoints(
    base: Path, tmp_path: Path, learning_rate: float
) -> None:
    """The recipe refuses a rate of 1 and more; these go past it."""
    recipe = recipe_of(max_steps=30, save_every_steps=1, keep_checkpoints=40)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": learning_rate})})
    with pytest.raises(TrainingStopped, match=r"(the loss is|holds NaN or infinity)"):
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe)
    assert all_finite(RunDir(tmp_path / "r"))
    assert not (tmp_path / "r" / "adapter").exists()


def test_rows_without_a_supervised_token_are_stopped(base: Path, tmp_path: Path) -> None:
    rows = Rows([type(row)(row.input_ids, [-100] * len(row.labels)) for row in make_rows(8, seed=9)], [])
    with pytest.raises(TrainingStopped, match=r"the loss|exactly 0"):
        train(base, tmp_path / "r", rows=rows, recipe=recipe_of())
    assert not (tmp_path / "r" / "adapter").exists()


def test_an_adapter_outside_of_the_graph_is_stopped(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of()
    loaded = attach(base, recipe)
    embedding = loaded.model.get_base_model().model.embed_tokens
    head = loaded.model.get_base_model().model
    head.register_forward_hook(lambda module, inputs, output: detached(output, embedding))
    with pytest.raises(TrainingStopped, match=r"no trained weight received a gradient"):
        train(base, tmp_path / "r", rows=ROWS, recipe=recipe, loaded=loaded)


def detached(output: Any, embedding: torch.nn.Module) -> Any:
    output.last_hidden_state = output.last_hidden_state.detach().requires_grad_()
    return output


def test_weights_that_take_no_part_are_told_once(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=3)
    loaded = attach(base, recipe)
    mlp = loaded.model.get_base_model().model.layers[1].mlp
    mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))

    class Told(SilentReporter):
        warnings: list[str] = []  # noqa: RUF012

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    train(base, tmp_path / "r", rows=ROWS, recipe=recipe, loaded=loaded, reporter=Told())
    assert len(Told.warnings) == 1
    assert "6 of 28 trained weights receive no gradient" in Told.warnings[0]


def test_a_float16_scale_may_overflow_a_few_times_and_not_for_ever() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    context = RunContext(RunDir(Path()), SilentReporter(), World())
    guard = GuardCallback(context, take_loss=lambda: torch.tensor(2.0))
    guard.trained = {"weight": weight}
    args: Any = SimpleNamespace(fp16=True, learning_rate=1e-4)
    state: Any = SimpleNamespace(global_step=0)
    model = torch.nn.Linear(1, 1)
    for gradient in ([math.inf] * MAX_FP16_OVERFLOWS, [1.0], [math.inf] * MAX_FP16_OVERFLOWS):
        for value in gradient:
            weight.grad = torch.full((2,), value)
            guard.on_pre_optimizer_step(args, state, None, model=model)
    with pytest.raises(TrainingStopped, match=r"its gradient inf") as told:
        guard.on_pre_optimizer_step(args, state, None, model=model)
    assert "float16 overflowed" in (told.value.hint or "")
    args.fp16 = False
    with pytest.raises(TrainingStopped):
        GuardCallback.on_pre_optimizer_step(guard, args, state, None, model=model)


def test_activations_past_float16_train_right_in_float32(tmp_path: Path) -> None:
    """Gate and up weights × 700 in the first layer pass 65504 (F23); a CPU refuses float16, a card is told to."""
    hot = save_base(tmp_path / "hot")
    tensors = load_file(hot / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 700
    save_file(tensors, hot / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(max_steps=20, learning_rate=1e-3)
    loaded = attach(hot, recipe)
    peaks: list[float] = []
    loaded.model.get_base_model().model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: peaks.append(float(inputs[0].detach().abs().max()))
    )
    run, result = train(hot, tmp_path / "r", rows=ROWS, recipe=recipe, loaded=loaded)
    assert max(peaks) > 700
    assert result.eval_loss_after is not None and result.eval_loss_before is not None
    found = [loss for _, loss in losses(run)]
    assert all(math.isfinite(loss) and loss > 0 for loss in found)
    assert sum(found[-4:]) < sum(found[:4])


@pytest.mark.gpu
def test_a_float16_hot_gemma_3_is_stopped_or_trained_right(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for weight in (model.model.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.up_proj.weight):
            weight.mul_(700)
    model.save_pretrained(tmp_path / "hot")
    recipe = recipe_of(max_steps=30, learning_rate=1e-3)
    engine = TransformersEngine()
    precision = Precision("float16", "float32", "fp16", "test")
    loaded = engine.load(tmp_path / "hot", LoadSettings(recipe.model, precision, max_seq_tokens=64))
    loaded = engine.attach_lora(loaded, section=recipe.lora, gradient_checkpointing="off", seed=0).loaded
    try:
        run, _ = train(tmp_path / "hot", tmp_path / "r", rows=ROWS, recipe=recipe, loaded=loaded)
    except TrainingStopped as stopped:
        assert "float16" in (stopped.hint or "")
        assert not (tmp_path / "r" / "adapter").exists()
    else:
        assert all_finite(run)
        assert any(bool(weight.any()) for name, weight in weights(run).items() if "lora_B" in name)
        found = [loss for _, loss in losses(run)]
        assert all(loss is not None and loss > 0 for loss in found[-4:])
        assert sum(found[-4:]) < sum(found[:4])


def test_find_non_finite_sees_every_weight(base: Path) -> None:
    loaded = attach(base, recipe_of())
    assert find_non_finite(loaded.model) is None
    name, weight = next(iter(trained_weights(loaded.model).items()))
    weight.data[0, 0] = math.inf
    assert find_non_finite(loaded.model) == name


def test_the_rehearsal_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    run, _ = train(base, tmp_path / "r", rows=ROWS, recipe=recipe_of(max_steps=1))
    assert sorted(path.name for path in run.path.iterdir()) == [
        "adapter", "checkpoints", "manifest.json", "metrics.jsonl",
    ]  # fmt: skip
    assert len(read_metrics(run)) == 1
