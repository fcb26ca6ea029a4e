"""Trainings of a very small random Gemma, in this process and with the transformers engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GemmaConfig, GemmaForCausalLM

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.engines.base import Engine, LoadedModel, LoadSettings
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.machine.precision import Precision
from gemma_tune.machine.world import ALONE, World
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.checkpoints import step_of
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import start_manifest
from gemma_tune.runs.metrics_log import keep_metrics_until, read_metrics
from gemma_tune.runs.reporter import Reporter, SilentReporter
from gemma_tune.training.adapter_weights import name_base
from gemma_tune.training.parts import TrainerParts
from gemma_tune.training.train_adapter import TrainingResult, train_adapter
from tests.training.random_rows import VOCAB, Rows


def save_base(path: Path) -> Path:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    GemmaForCausalLM(config).save_pretrained(path)
    return path


def recipe_of(**training: Any) -> Recipe:
    """A recipe of small steps; `four_bit`, `dropout`, `eval_every`, `log_every`, `trackers` go into their sections."""
    defaults = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 6, "gradient_checkpointing": "off"}
    return Recipe.model_validate(
        {
            "model": {"load_in_4bit": training.pop("four_bit", False)},
            "lora": {"rank": 4, "dropout": training.pop("dropout", 0.0), **training.pop("lora", {})},
            "data": {"source": "x", "max_seq_tokens": 64},
            "evaluation": {"every_steps": training.pop("eval_every", None)},
            "logging": {"every_steps": training.pop("log_every", 1), "trackers": training.pop("trackers", ())},
            "training": {**defaults, **training},
        }
    )


def attach(base: Path, recipe: Recipe, *, world: World = ALONE) -> LoadedModel:
    engine = TransformersEngine()
    precision = Precision("float32", "float32", None, "test")
    sharded = world.shards(recipe.training.data_parallel)
    settings = LoadSettings(recipe.model, precision, max_seq_tokens=64, will_be_sharded=sharded)
    loaded = engine.load(base, settings)
    return engine.attach_lora(loaded, section=recipe.lora, gradient_checkpointing="off", seed=0).loaded


def train(
    base: Path,
    directory: Path,
    *,
    rows: Rows,
    recipe: Recipe,
    loaded: LoadedModel | None = None,
    resume_from: Path | None = None,
    reporter: Reporter | None = None,
    world: World = ALONE,
) -> tuple[RunDir, TrainingResult]:
    directory.mkdir(exist_ok=True)
    run = RunDir(directory)
    if not run.manifest.is_file():
        start_manifest(run)
    loaded = loaded or attach(base, recipe, world=world)
    name_base(loaded.model, name="somebody/some-gemma", revision="abc")
    parts = parts_of(run, loaded, rows=rows, recipe=recipe, reporter=reporter, world=world)
    return run, train_adapter(parts, resume_from=resume_from)


def parts_of(
    run: RunDir,
    loaded: LoadedModel,
    *,
    rows: Rows,
    recipe: Recipe,
    reporter: Reporter | None = None,
    world: World = ALONE,
    engine: Engine | None = None,
) -> TrainerParts:
    datasets: Datasets = rows  # type: ignore[assignment]
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    context = RunContext(run, reporter or SilentReporter(), world)
    return TrainerParts(
        context, recipe, engine or TransformersEngine(), loaded, tokenizer, Encoder(tokenizer), datasets
    )


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def cut_after(whole: RunDir, directory: Path, *, step: int) -> RunDir:
    """A copy of a run as it was when it had saved a step."""
    shutil.copytree(whole.path, directory)
    run = RunDir(directory)
    for checkpoint in run.checkpoints.iterdir():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run.adapter)
    keep_metrics_until(run, step)
    return run


def require_equal_bits(found: RunDir, expected: RunDir) -> None:
    """The weights, and every figure of metrics.jsonl that no clock and no machine decides."""
    others = {"tokens_per_second", "eta_seconds", "memory_bytes", "seconds"}
    of_found, of_expected = (
        [{name: row[name] for name in row.keys() - others} for row in read_metrics(run)] for run in (found, expected)
    )
    assert of_found == of_expected
    wanted = weights(expected)
    assert weights(found).keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights(found).items())


def require_same_training(found: RunDir, expected: RunDir) -> None:
    """Figures within 1e-5 and weights within 1e-4, of a training that has learned something."""
    for one, two in zip(read_metrics(expected), read_metrics(found), strict=True):
        for figure in one.keys() & {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss"}:
            assert two[figure] == pytest.approx(one[figure], abs=1e-5), (one["step"], figure)
    wanted, got = weights(expected), weights(found)
    assert got.keys() == wanted.keys()
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) < 1e-4
    assert max(float(weight.abs().max()) for weight in wanted.values()) > 1e-2
