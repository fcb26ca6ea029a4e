"""A run on the embedded Gemma without a training: an adapter that was drawn, and the files that an evaluation reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import build_datasets
from gemma_tune.data.rows.template import load_template
from gemma_tune.disk import write_json
from gemma_tune.models.fetch import fetch_model
from gemma_tune.models.safetensors import file_hashes, tokenizer_hashes
from gemma_tune.paths import TINY_MODEL_DIR, TINY_ROWS_DIR
from gemma_tune.recipe.load import dump_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import Lock
from gemma_tune.runs.manifest import start_manifest, update_manifest

NUM_ROWS = 10
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class DrawnRun:
    run: RunDir
    rows: list[dict[str, str]]
    rows_file: Path


@pytest.fixture(scope="session")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> DrawnRun:
    folder = tmp_path_factory.mktemp("evaluated")
    lines = (TINY_ROWS_DIR / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    rows_file = folder / "held-out.jsonl"
    rows_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "model": {"engine": "transformers", "load_in_4bit": False, "dtype": "float32"},
            "data": {"source": "tiny-world#20", "eval_source": str(rows_file), "max_seq_tokens": 512},
            "evaluation": {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 4},
        }
    )
    run = RunDir(folder / "run-001")
    run.path.mkdir()
    start_manifest(run)
    update_manifest(run, status="finished")
    run.resolved_recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    run.template.write_text(load_template("dolly").source_text, encoding="utf-8")

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)
    base = fetch_model("gemma-tiny")
    inputs = open_inputs(recipe.data, prefers_chat=False)
    datasets = build_datasets(
        recipe.data, inputs, Encoder(tokenizer), chat=None, tokenizer_files=tokenizer_hashes(base.directory)
    )
    write_json(
        run.lock,
        asdict(
            Lock(
                recipe="drawn",
                overrides=[],
                base={"name": "gemma-tiny", "revision": None, "files": file_hashes(base.directory)},
                data={"label": datasets.report.label, "sha256": datasets.sha256},
                engine={"name": "transformers", "reason": ""},
                precision={"compute": "float32", "reason": ""},
                hardware={"name": "cpu"},
                seed=0,
            )
        ),
    )
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(run.adapter)
    tokenizer.save_pretrained(run.adapter)
    return DrawnRun(run, [json.loads(line) for line in lines], rows_file)
