"""A training method is added with a row of the table and a class: no other file of the package knows of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli.app import main
from gemma_tune.disk import read_json
from gemma_tune.recipe.methods import METHODS, MethodSection
from gemma_tune.recipe.section import PositiveFloat
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.training.loop import Loop, build_loop
from gemma_tune.training.methods.method import LossSums
from gemma_tune.training.methods.sft import Sft
from gemma_tune.training.parts import TrainerParts

SCALE = 3.0
SHORT = (
    "quickstart", "model.engine=transformers", "training.max_steps=2", "data.max_eval_rows=4", "data.max_train_rows=40",
    "evaluation.exact_match=false", "evaluation.num_questions=0",
)  # fmt: skip


class ScaledSection(MethodSection):
    scale: PositiveFloat = 1.0


class Scaled(Sft):
    """A constant times the loss of `sft`."""

    def make_trainer(self, parts: TrainerParts) -> Loop:
        assert isinstance(parts.recipe.method, ScaledSection)
        self.scale = parts.recipe.method.scale
        return build_loop(parts, self)

    def loss_of(self, trainer: Loop, batch: dict[str, Any]) -> LossSums:
        sums = super().loss_of(trainer, batch)
        return LossSums(self.scale * sums.total, sums.count)


@pytest.fixture(autouse=True)
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    location = f"{__name__}:{Scaled.__name__}"
    METHODS.add(replace(METHODS["sft"], name="scaled", location=location, section=ScaledSection))
    yield
    METHODS.remove("scaled")


def gemma_tune(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gemma-tune", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_method_is_trained_from_the_command_line(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = (*SHORT, f"training.packing={packing}")
    assert gemma_tune(monkeypatch, "train", *short, "run.name=plain") == 0
    wanted = ("method=scaled", f"method.scale={SCALE}", "run.name=toy")
    assert gemma_tune(monkeypatch, "train", *short, *wanted) == 0
    plain, toy = (RunDir(Path("runs") / name) for name in ("plain", "toy"))
    first, scaled_first = (read_metrics(run)[0] for run in (plain, toy))
    for figure in ("loss", "grad_norm"):
        assert scaled_first[figure] == pytest.approx(SCALE * first[figure], rel=1e-4)
    before, scaled_before = (read_json(run.summary)["eval_loss_before"] for run in (plain, toy))
    assert scaled_before == pytest.approx(SCALE * before, rel=1e-6)
    assert read_json(toy.lock)["method"] == "scaled"
    assert "method:\n  name: scaled\n  scale: 3.0\n" in toy.resolved_recipe.read_text(encoding="utf-8")
    assert "scaled" in toy.report_text.read_text(encoding="utf-8")


def test_it_is_in_the_schema_and_its_keys_are_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gemma_tune(monkeypatch, "recipes", "schema") == 0
    assert '"const": "scaled"' in capsys.readouterr().out
    assert gemma_tune(monkeypatch, "validate", "quickstart", "method=scalde", "--json") == 2
    assert "must be one of 'sft', 'scaled', found 'scalde'; did you mean 'scaled'?" in capsys.readouterr().err
    assert gemma_tune(monkeypatch, "validate", "quickstart", "method.scale=2") == 2
    assert "method: scale is a key of the method scaled, and the method sft has: name" in capsys.readouterr().err
    assert gemma_tune(monkeypatch, "validate", "quickstart", "method={name: scaled, scale: -1}") == 2
    assert "method.scale: must be a number above 0.0, found -1" in capsys.readouterr().err
