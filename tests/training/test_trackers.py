"""A tracker that is not there, or would ask for a key, is told before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import get_args

import pytest

from gemma_tune.errors import RunError
from gemma_tune.recipe.schema import LoggingSection
from gemma_tune.runs.layout import RunDir
from gemma_tune.training import trackers
from gemma_tune.training.loop import to_sft_config
from gemma_tune.training.trackers import require_trackers, tracking
from tests.training.random_rows import Rows
from tests.training.small_runs import attach, parts_of, recipe_of


def test_the_table_has_every_tracker_of_the_schema() -> None:
    (of_names, _) = get_args(LoggingSection.model_fields["trackers"].annotation)
    assert set(trackers._PACKAGES) == set(get_args(of_names))


def test_none_needs_nothing() -> None:
    require_trackers(())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_one_is_named_with_its_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(RunError, match=rf"names {name}, which is not installed") as told:
        require_trackers((name,))
    assert f"pip install {name}" in (told.value.hint or "")


def test_one_that_fails_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    unreachable = type("MlflowException", (Exception,), {"__module__": "mlflow.exceptions"})
    with (
        pytest.raises(RunError, match=r"the tracker mlflow failed: no route to it"),
        tracking(("mlflow",), run=RunDir(tmp_path)),
    ):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
        raise unreachable("no route to it")
    with pytest.raises(unreachable), tracking(("wandb",), run=RunDir(tmp_path)):
        raise unreachable("not of a tracker that was named")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_wandb_without_a_key_never_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RunError, match=r"knows no key"):
        require_trackers(("wandb",))
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(("wandb",))
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n", encoding="utf-8")
    (tmp_path / "netrc").chmod(0o600)
    require_trackers(("wandb",))


@pytest.mark.parametrize("names", [(), ("tensorboard", "wandb", "mlflow", "trackio")])
def test_the_trainer_reports_to_those_and_to_nobody_else(names: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(trackers=names)
    config = to_sft_config(parts_of(RunDir(tmp_path), attach(base, recipe), rows=Rows([]), recipe=recipe))
    assert config.report_to == list(names)
    assert not config.push_to_hub and config.hub_token is None
