"""The trainer against plain PyTorch: collation, token weighting, guards, checkpoints, resumption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_tune.data.encode.arrays import IGNORED, EncodedRow
from gemma_tune.errors import TrainingStopped
from gemma_tune.runs.checkpoints import last_complete_checkpoint
from gemma_tune.runs.layout import RunDir
from gemma_tune.training.layouts import PadRight
from gemma_tune.training.loop import build_loop
from gemma_tune.training.methods.method import start_method
from tests.training.random_rows import Rows, make_rows
from tests.training.small_runs import attach, losses, parts_of, recipe_of, train, weights


def reference_loss(model: torch.nn.Module, rows: Sequence[EncodedRow]) -> float:
    """Cross-entropy a supervised token, row by row, without batches, padding or the trainer."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
            targets = torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            count += int((targets != IGNORED).sum())
    return total / count


def test_padding_has_no_label_and_no_attention_even_when_pad_is_the_stop_token() -> None:
    rows = [
        (np.array([2, 7, 1], dtype=np.int32), np.array([False, True, True])),
        (np.array([2, 8, 9, 9, 1], dtype=np.int32), np.ones(5, dtype=np.bool_)),
    ]
    batch = PadRight(pad_token_id=1, pad_to_multiple_of=4)([[row] for row in rows])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"][0].tolist() == [IGNORED, 7, 1] + [IGNORED] * 5
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]


def test_eval_loss_is_weighted_by_token_whatever_the_batch_size(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(8, seed=1), make_rows(11, seed=2))
    expected = None
    for batch_size in (1, 4):
        recipe = recipe_of(max_steps=1, batch_size=batch_size)
        loaded = attach(base, recipe)
        expected = expected or reference_loss(loaded.model, rows.eval)
        _, result = train(base, tmp_path / f"{batch_size}", rows=rows, recipe=recipe, loaded=loaded)
        assert result.eval_loss_before == pytest.approx(expected, abs=1e-5)
        assert result.eval_loss_after == pytest.approx(reference_loss(loaded.model, rows.eval), abs=1e-5)


def test_the_reported_loss_is_that_of_plain_pytorch(base: Path, tmp_path: Path) -> None:
    rows = make_rows(4, seed=3)
    recipe = recipe_of(max_steps=1)
    expected = reference_loss(attach(base, recipe).model, rows)
    run, result = train(base, tmp_path / "r", rows=Rows(rows, []), recipe=recipe)
    assert losses(run)[0][1] == pytest.approx(expected, abs=1e-5)
    assert result.num_tokens == sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("dropout", [0.0])
def test_accumulation_equals_one_big_batch(base: Path, tmp_path: Path, dropout: float) -> None:
    """Rows of very different length: a mean of means would weight their tokens differently (F28)."""
    rows = Rows([*make_rows(6, seed=4, shortest=4, longest=5), *make_rows(6, seed=5, shortest=40, longest=50)], [])
    settings = {"max_steps": 3, "group_by_length": False, "dropout": dropout, "optimizer": "sgd", "learning_rate": 0.5}
    big, _ = train(base, tmp_path / "big", rows=rows, recipe=recipe_of(batch_size=4, **settings))
    many, _ = train(
        base, tmp_path / "many", rows=rows, recipe=recipe_of(batch_size=1, gradient_accumulation=4, **settings)
    )
    for (_, one), (_, other) in zip(losses(big), losses(many), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for name, weight in weights(big).items():
        torch.testing.assert_close(weights(many)[name], weight, rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(16, seed=6), [])
    first, second = (weights(train(base, tmp_path / n, rows=rows, recipe=recipe_of(dropout=0.1))[0]) for n in "ab")
    other = weights(train(base, tmp_path / "c", rows=rows, recipe=recipe_of(dropout=0.1, seed=1))[0])
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in first.items())


def test_a_non_finite_gradient_stops_before_it_reaches_the_weights(base: Path, tmp_path: Path) -> None:
    rows = Rows(make_rows(8, seed=9), [])
    recipe = recipe_of(max_steps=6, save_every_steps=2)
    loaded = attach(base, recipe)
    calls = 0

    def poison(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls == 5 else output  # the first call is the rehearsal's

    layer = loaded.model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(poison)
    with pytest.raises(TrainingStopped, match=r"step 4: the loss is nan") as caught:
        train(base, tmp_path / "r", rows=rows, recipe=recipe, loaded=loaded)
    assert "training.learning_rate=" in (caught.value.hint or "")
    assert all(bool(torch.isfinite(weight).all()) for weight in loaded.model.parameters())
    assert last_complete_checkpoint(RunDir(tmp_path / "r"))[0].name == "checkpoint-2"


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.999])
def test_a_warm_up_never_takes_every_step(base: Path, tmp_path: Path, share: float) -> None:
    recipe = recipe_of(warmup_fraction=share)
    parts = parts_of(RunDir(tmp_path), attach(base, recipe), rows=Rows(make_rows(4, seed=1)), recipe=recipe)
    for num_steps in range(1, 41):
        trainer = build_loop(parts, start_method(recipe))
        scheduler = trainer.create_scheduler(num_steps, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
        rates = []
        for _ in range(num_steps):
            rates += scheduler.get_last_lr()
            scheduler.optimizer.step()
            scheduler.step()
        warm_up = min(math.ceil(share * num_steps), num_steps - 1)
        assert rates[:warm_up] == pytest.approx([step / warm_up for step in range(warm_up)])
        assert rates[warm_up] == pytest.approx(1.0), (num_steps, rates)


def test_a_nan_in_the_base_is_named(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of()
    loaded = attach(base, recipe)
    with torch.no_grad():
        loaded.model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = math.nan
    with pytest.raises(TrainingStopped) as caught:
        train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe, loaded=loaded)
    assert "layers.1.mlp.down_proj" in (caught.value.hint or "")
    assert losses(RunDir(tmp_path / "r")) == []


def test_what_is_saved_names_its_base_and_no_path(base: Path, tmp_path: Path) -> None:
    run, _ = train(base, tmp_path / "r", rows=Rows(make_rows(8, seed=9), []), recipe=recipe_of(max_steps=1))
    config = (run.adapter / "adapter_config.json").read_text(encoding="utf-8")
    assert '"base_model_name_or_path": "somebody/some-gemma"' in config
    assert '"revision": "abc"' in config
    assert str(base) not in config
    assert not any("embed_tokens" in name for name in weights(run))
