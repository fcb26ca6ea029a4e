"""A new family is one `Family` in the table: reading, planning, training and merging of its models follow from it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from gemma_tune.cli.app import main
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.exporting.export_formats import verify_directories
from gemma_tune.exporting.export_record import read_record
from gemma_tune.exporting.export_source import open_source
from gemma_tune.exporting.verify.forms import measure_here
from gemma_tune.exporting.verify.probe_texts import built_in_probe
from gemma_tune.models.families.known import FAMILIES
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.runs.reporter import SilentReporter

TYPE = "toygemma"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

SHORT = (
    "model.engine=transformers",
    "training.max_steps=2",
    "data.max_eval_rows=4",
    "evaluation.exact_match=false",
    "evaluation.num_questions=0",
)


class ToyGemmaConfig(GemmaConfig):
    model_type = TYPE


class ToyGemmaForCausalLM(GemmaForCausalLM):
    config_class = ToyGemmaConfig


@pytest.fixture(scope="module", autouse=True)
def toy_family() -> Iterator[None]:
    """The whole of what a family needs, but for its classes in transformers."""
    FAMILIES.add(dataclasses.replace(FAMILIES["gemma"], name=TYPE, title="Toy Gemma", model_types=(TYPE,)))
    AutoConfig.register(TYPE, ToyGemmaConfig)
    AutoModelForCausalLM.register(ToyGemmaConfig, ToyGemmaForCausalLM)
    yield
    FAMILIES.remove(TYPE)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    tiny = json.loads((TINY_MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    ids = {name: tiny[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = ToyGemmaConfig(**ids, **SIZES, num_key_value_heads=1, head_dim=16, max_position_embeddings=1024)
    torch.manual_seed(0)
    ToyGemmaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL_DIR / name, directory)
    return directory


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gemma-tune", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        assert end.value.code == 0, told.err
        return told.out

    return run


def test_a_toy_family_is_trained_and_merged_from_the_command_line(
    model_dir: Path, tmp_path: Path, run_command: Any
) -> None:
    assert json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["model_type"] == TYPE
    shown = json.loads(run_command("models", "show", str(model_dir), "--json"))
    assert shown["facts"]["Family"] == f"{TYPE} (model_type {TYPE})"

    run = tmp_path / "toy"
    settings = (*SHORT, f"model.name={model_dir}", f"run.output_dir={tmp_path}", f"run.name={run.name}")
    run_command("plan", "quickstart", *settings)
    run_command("train", "quickstart", *settings)
    run_command("merge", str(run), "--skip-verify")

    # The command checks in a process of its own, which reads the table as it is installed, so the check is called here.
    export = run / "export" / "merged-16bit"
    probe = built_in_probe(Encoder(load_tokenizer(model_dir)), num_positions=40)
    report = verify_directories(
        open_source(run), [export], probe=probe, reporter=SilentReporter(), measure=measure_here
    )
    assert [each.passed for each in report.exports] == [True] and read_record(export).passed
    merged = load_file(export / "model.safetensors")
    base = load_file(model_dir / "model.safetensors")
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert json.loads((export / "config.json").read_text(encoding="utf-8"))["model_type"] == TYPE
