"""An engine is a class and a row of ENGINES: a toy one is used by name, and nothing else of the package knows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.engines.base import AttachedLora, LoadedModel, LoadSettings
from gemma_tune.engines.engine_facts import ENGINES

Command = Callable[..., tuple[str, str]]


class ToyEngine:
    """The transformers engine under another name."""

    name = "toy"

    def __init__(self) -> None:
        from gemma_tune.engines.transformers import TransformersEngine

        self._plain = TransformersEngine()

    def load(self, directory: Path, settings: LoadSettings) -> LoadedModel:
        return replace(self._plain.load(directory, settings), engine=self.name)

    def attach_lora(self, loaded: LoadedModel, **settings: Any) -> AttachedLora:
        attached = self._plain.attach_lora(loaded, **settings)
        return replace(attached, loaded=replace(attached.loaded, engine=self.name))

    def set_mode(self, loaded: LoadedModel, *, training: bool) -> None:
        self._plain.set_mode(loaded, training=training)


@pytest.fixture
def _toy() -> Iterator[None]:
    plain = ENGINES["transformers"]
    ENGINES.add(
        replace(plain, name="toy", location=f"{__name__}:ToyEngine", own_checkpointing="toy-box", tags=("toy",))
    )
    yield
    ENGINES.remove("toy")


@pytest.mark.usefixtures("_toy")
def test_an_added_engine_trains_and_is_named(gemma: Command, tmp_path: Path) -> None:
    gemma(
        "train", "quickstart", "model.engine=toy", "model.load_in_4bit=false", "training.max_steps=2",
        "training.gradient_checkpointing=toy-box", "evaluation.every_steps=null", "evaluation.num_questions=0",
        "evaluation.exact_match=false", "data.max_train_rows=16", "run.name=toy", "run.output_dir=runs",
    )  # fmt: skip
    run = tmp_path / "runs" / "toy"
    assert json.loads((run / "lock.json").read_text(encoding="utf-8"))["engine"]["name"] == "toy"
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.usefixtures("_toy")
def test_an_added_engine_is_planned_and_listed(gemma: Command) -> None:
    planned = json.loads(gemma("plan", "gemma-7b-dolly", "--gpu", "l4", "--json", "model.engine=toy")[0])
    plain = json.loads(gemma("plan", "gemma-7b-dolly", "--gpu", "l4", "--json", "model.engine=transformers")[0])
    assert planned["engine"] == "toy"
    assert planned["need_bytes"] == plain["need_bytes"]
    schema = json.loads(gemma("recipes", "schema")[0])
    model, training = (schema["$defs"][name]["properties"] for name in ("ModelSection", "TrainingSection"))
    assert model["engine"]["enum"] == ["auto", "unsloth", "transformers", "toy"]
    assert model["engine"]["default"] == "auto" and model["engine"]["description"]
    assert training["gradient_checkpointing"]["enum"] == ["off", "on", "unsloth", "toy-box"]
    _, err = gemma("validate", "quickstart", "model.engine=toys", code=2)
    assert "model.engine: must be one of 'auto', 'unsloth', 'transformers', 'toy', found 'toys'" in err
    assert "did you mean 'toy'?" in err


def test_an_engine_that_is_not_there_is_refused(gemma: Command) -> None:
    _, err = gemma("validate", "quickstart", "model.engine=toy", code=2)
    assert "must be one of 'auto', 'unsloth', 'transformers', found 'toy'" in err
