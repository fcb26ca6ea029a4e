"""Whole runs on the embedded Gemma: what a run leaves, how it is continued, what it refuses, and that it learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_tune.disk import read_json
from gemma_tune.errors import ExportError, RunError, TrainingInterrupted
from gemma_tune.exporting.export_formats import find_exports, outcome_of
from gemma_tune.flows import train as flow
from gemma_tune.flows.decide import decide, report_plan
from gemma_tune.flows.prepare import require_equal
from gemma_tune.machine.cards import find_card
from gemma_tune.machine.world import World
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import Lock
from gemma_tune.runs.manifest import read_manifest
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import SilentReporter
from gemma_tune.runs.summary import read_summary

SHORT = (
    "model.engine=transformers",
    "training.max_steps=4",
    "training.save_every_steps=2",
    "data.max_eval_rows=8",
    "evaluation.every_steps=2",
)


def train(folder: Path, *overrides: str, resume: bool = False) -> RunDir:
    recipe = load_recipe(Path("quickstart"), [*SHORT, f"run.output_dir={folder}", *overrides])
    outcome = flow.train(recipe, reporter=SilentReporter(), resume=resume)
    outcome.require_exported()
    return outcome.run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(tmp_path_factory.mktemp("runs"), "export.formats=[merged-16bit]", "export.dtype=float32")


def test_a_run_leaves_what_the_readme_says(run: RunDir) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split("## A run directory")[1].split("##")[0]
    for path in run.path.iterdir():
        assert path.name in table
    assert read_manifest(run).status == "finished"
    assert run.name == "quickstart-001"
    assert run.loss_curve.read_bytes().startswith(b"\x89PNG")


def test_a_run_on_a_card_says_first_whether_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(SilentReporter):
        def __init__(self) -> None:
            self.details: list[str] = []
            self.warnings: list[str] = []

        def detail(self, text: str) -> None:
            self.details.append(text)

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    loaded = load_recipe(Path("quickstart"), ["training.gradient_checkpointing=off", "training.batch_size=1024"])
    decisions, told = decide(loaded), Told()
    context = RunContext(RunDir(tmp_path), told, World())
    for card, lines in (("GB=2", told.warnings), ("h100", told.details)):
        monkeypatch.setattr("gemma_tune.flows.decide.detect_card", lambda card=card: find_card(card))
        report_plan(context, decisions)
        assert "GB (±" in lines[-1]
        plan = read_json(tmp_path / "plan.json")
        assert plan["allocated_bytes"] > 0 and plan["uncertainty_bytes"] > 0
    assert len(told.warnings) == 1


def test_the_summary_agrees_with_the_files(run: RunDir) -> None:
    summary = read_summary(run)
    answers = [json.loads(line) for line in run.answers.read_text(encoding="utf-8").splitlines()]
    assert (summary.steps, summary.eval_rows, summary.exact_match_rows) == (4, 8, 8)
    assert summary.exact_match_after == sum(row["after"] == row["expected"] for row in answers) / 8
    assert len(summary.questions) == 3
    evaluations = [row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row]
    assert summary.eval_loss_after == pytest.approx(evaluations[-1], abs=1e-6)
    assert summary.eval_loss_before and summary.eval_loss_after < summary.eval_loss_before
    assert summary.num_tokens == read_metrics(run)[-2]["num_tokens"]


def test_the_lock_names_everything_and_no_path(run: RunDir) -> None:
    lock = read_json(run.lock)
    assert lock["base"]["name"] == "gemma-tiny"
    assert len(lock["base"]["files"]["model.safetensors"]) == 64
    assert len(lock["data"]["sha256"]) == len(lock["data"]["template_sha256"]) == 64
    assert lock["packages"]["torch"]
    assert lock["engine"] == {"name": "transformers", "reason": "the recipe asks for it"}
    for file in (run.lock, run.adapter / "adapter_config.json", run.summary, run.resolved_recipe):
        assert str(TINY_MODEL_DIR) not in file.read_text(encoding="utf-8")


def test_the_resolved_recipe_is_the_run_again(run: RunDir) -> None:
    resolved = load_recipe(run.resolved_recipe).recipe
    assert resolved.training.max_steps == 4
    assert resolved.run.output_dir == str(run.path.parent)


def test_merged_equals_base_plus_adapter_in_plain_transformers(run: RunDir) -> None:
    """The must-show: 1e-4 in float32 against the unquantised base with PEFT's adapter."""
    merged_dir = run.exports / "merged-16bit"
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
    ids = tokenizer("### Instruction:\nWhere is the baker of Ostel?\n\n### Response:\n", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, run.adapter)(ids).logits
        found = merged(ids).logits
    assert float((plain - expected).abs().max()) > 1e-2
    assert float((found - expected).abs().max()) < 1e-4


def test_what_the_recipe_exports_is_proven(run: RunDir) -> None:
    (exported,) = outcome_of(find_exports(run.path)[1], None).exports
    assert (exported.format, exported.path) == ("merged-16bit", run.exports / "merged-16bit")
    assert exported.result is not None and exported.result.passed
    # Against the model as it was trained, in 4 bits (F41).
    assert exported.record.verification is not None
    on_16_bits, expanded = exported.record.verification["trained"]
    assert on_16_bits["distance"]["mean_kl"] > expanded["distance"]["mean_kl"]


def test_an_unknown_export_format_is_told_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="did you mean 'merged-16bit'"):
        train(tmp_path / "runs", "export.formats=[merged-16bits]")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no module named 'q_porj'"):
        train(tmp_path / "runs", "lora.targets=[q_porj]")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_is_the_uninterrupted_one(run: RunDir, tmp_path: Path) -> None:
    short = train(tmp_path, "run.name=cut", "training.max_steps=2", "training.schedule=constant")
    train(tmp_path, "run.name=cut", "training.max_steps=4", "training.schedule=constant", resume=True)
    whole = train(tmp_path, "run.name=whole", "training.max_steps=4", "training.schedule=constant")
    assert read_manifest(short).status == "finished"
    weights = [(folder.adapter / "adapter_model.safetensors").read_bytes() for folder in (short, whole)]
    assert weights[0] == weights[1]


def test_another_recipe_is_not_resumed(run: RunDir) -> None:
    with pytest.raises(RunError, match=r"lora\.rank: 16 → 8") as caught:
        train(run.path.parent, "lora.rank=8", resume=True)
    assert "training.max_steps" not in caught.value.message


@dataclass(frozen=True)
class SecondOfTwo(World):
    first: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        return [self.first, value]


@pytest.mark.parametrize(
    ("override", "rows", "told"),
    [
        ("training.learning_rate=1e-3", "a", r"training\.learning_rate: 0\.003 → 0\.001"),
        ("training.max_steps=7", "a", r"training\.max_steps: None → 7"),
        ("lora.rank=4", "b", r"(?s)lora\.rank: 16 → 4.*data\.sha256: 'a' → 'b'"),
        ("run.output_dir=elsewhere", "a", None),
        ("data.source=other.jsonl", "a", None),  # the same rows in another place
    ],
)
def test_processes_that_would_train_something_else_are_refused(override: str, rows: str, told: str | None) -> None:
    def described(*overrides: str, rows: str) -> tuple[Recipe, Lock]:
        lock = Lock("quickstart", [], {}, {"sha256": rows}, {}, {}, {}, seed=0, processes=2)
        return load_recipe(Path("quickstart"), overrides).recipe, lock

    recipe, lock = described(rows="a")
    world = SecondOfTwo(rank=1, size=2, first=(recipe, asdict(lock)))
    recipe, lock = described(override, rows=rows)
    if told is None:
        require_equal(recipe, lock, world=world)
    else:
        with pytest.raises(RunError, match=told):
            require_equal(recipe, lock, world=world)


def cli(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gemma_tune.cli.app", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    process = cli(
        "train", "quickstart", *SHORT, "training.max_steps=500", "evaluation.exact_match=false", folder=tmp_path
    )
    metrics = tmp_path / "runs" / "quickstart-001" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.is_file() and '"step": 3' in metrics.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == TrainingInterrupted.exit_code
    assert out == ""
    assert f"stopped by {number.name}" in err
    assert "Traceback" not in err
    command = next(line for line in err.splitlines() if "resume it with: " in line).partition("resume it with: ")[2]
    run = RunDir(tmp_path / "runs" / "quickstart-001")
    manifest = read_manifest(run)
    assert (manifest.status, manifest.step >= 3) == ("stopped", True)
    words = [word.replace("max_steps=500", f"max_steps={manifest.step + 1}") for word in command.split()[1:]]
    again = cli(*words, folder=tmp_path)
    out, err = again.communicate(timeout=90)
    assert again.returncode == 0, err
    assert f"resuming from checkpoint-{manifest.step}" in err
    assert read_manifest(run).status == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["model.engine=transformers"], ["model.load_in_4bit=false"]])
def test_the_embedded_gemma_learns_to_answer(tmp_path: Path, overrides: list[str]) -> None:
    """The must-show of the foundation, as a user would run it."""
    process = cli("train", "quickstart", "--json", *overrides, folder=tmp_path)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["engine"] == ("transformers" if "model.engine=transformers" in overrides else "unsloth")
    assert summary["quantization"] == ("16 or 32 bits" if "model.load_in_4bit=false" in overrides else "NF4")
    assert summary["exact_match_rows"] >= 100
    assert summary["exact_match_before"] < 0.1
    assert summary["exact_match_after"] > 0.8
    assert summary["eval_loss_after"] < summary["eval_loss_before"] / 4
