"""Runs to report on, made of the dataclasses that a training writes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemma_tune.data.data_report import DataReport, LengthBin, SourceReport
from gemma_tune.disk import write_json
from gemma_tune.evaluation.figures import RowResult, groups_of, measure_answer
from gemma_tune.recipe.load import dump_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.evaluation import Evaluation, Side, write_evaluation
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import Lock
from gemma_tune.runs.manifest import start_manifest, update_manifest
from gemma_tune.runs.metrics_log import append_metrics
from gemma_tune.runs.summary import Question, RunSummary, write_summary

DATA = DataReport(
    sources=(SourceReport("rows.jsonl", "dolly", True, 110, 2, 100, 0),),
    eval_label=None, rows_read=110, rows_bad=2, bad_samples=("rows.jsonl:3: response is missing",), num_duplicates=1,
    num_leaked=0, left_out={"near duplicates": 3}, stripped={}, num_unused=0, train_rows=100,
    eval_rows=8, notes=("a note",), max_seq_tokens=128, dropped_too_long=0,
    truncated=0, truncated_answers=0, length_p50=40, length_p90=90,
    length_p99=120, length_max=126, longest_row="rows.jsonl:9", length_bins=(LengthBin(0, 16, 2),),
    train_tokens=4000, eval_tokens=300,
    train_supervised_tokens=1000, eval_supervised_tokens=80, control_strings=0, control_as="text", control_samples=(),
    dropped_samples=(), sha256="d" * 64,
)  # fmt: skip
SUMMARY = RunSummary(
    model="gemma-tiny", engine="unsloth", quantization="NF4", precision="float32", train_rows=100, eval_rows=8,
    dropped_rows=0, num_trainable=1234, steps=20, training_seconds=65.0, total_seconds=80.0, num_tokens=8000,
    peak_memory_bytes=900_000_000, train_loss=0.25, eval_loss_before=2.5, eval_loss_after=0.5, exact_match_before=0.0,
    exact_match_after=0.75, exact_match_rows=8, questions=[Question("Who bakes?", "A baker.", "No idea.", "A baker.")],
)  # fmt: skip


def drawn_evaluation(category: str) -> Evaluation:
    def results(answers: list[str], nats: float) -> list[RowResult]:
        return [
            RowResult(nats, 4, measure_answer("", text, "A baker.", num_tokens=3, stopped=True, expects_json=False))
            for text in answers
        ]

    rows: dict[Side, list[RowResult]] = {
        "base": results(["No idea."] * 8, 9.0),
        "tuned": results(["A baker."] * 6 + ["Nobody."] * 2, 1.0),
    }
    texts: dict[Side, list[RowResult]] = {
        "base": [RowResult(2.0 + at, 4, None) for at in range(4)],
        "tuned": [RowResult(3.0 + at, 4, None) for at in range(4)],
    }
    return Evaluation(
        made="2026-01-01T00:00:00+00:00",
        key={},
        rows_label=f"{category} rows",
        rows=groups_of(rows, [category] * 5 + [None] * 3),
        general=groups_of(texts, ["prose"] * 4),
        general_label="plain prose",
    )


def make_run_in(
    folder: Path, name: str = "mine-001", *, evaluated: bool = True, text: str | None = None, **settings: Any
) -> RunDir:
    """A finished run; `text` stands wherever a run holds text of somebody else."""
    run = RunDir(folder / name)
    run.path.mkdir(parents=True)
    start_manifest(run)
    update_manifest(run, status="finished", step=20, total_steps=20, error=text)
    values = {"data": {"source": text or "rows.jsonl", "max_seq_tokens": 128}, "training": settings}
    run.resolved_recipe.write_text(dump_recipe(Recipe.model_validate(values)), encoding="utf-8")
    lock = Lock(
        recipe=text or "mine",
        overrides=[text or "training.epochs=2"],
        base={"name": text or "gemma-tiny", "revision": None, "files": {"model.safetensors": "a" * 64}},
        data={"label": text or "rows.jsonl", "sha256": "d" * 64, "template_sha256": "e" * 64},
        engine={"name": "unsloth", "reason": text or "it works"},
        precision={"compute": "float32", "storage": "float32", "autocast": None, "reason": text or "no units"},
        hardware={"kind": "cpu", "name": text or "a processor", "memory_bytes": None},
        seed=7,
        packages={"torch": "2.13.0+cpu", "peft": "0.21.2", "unsloth": None},
    )
    write_json(run.lock, asdict(lock))
    data, summary = DATA, SUMMARY
    if text is not None:
        data = replace(
            DATA, sources=(SourceReport(text, text, True, 1, 0, 1, 0),), eval_label=text, notes=(text,),
            left_out={text: 1}, control_as=text, control_strings=1,
        )  # fmt: skip
        summary = replace(SUMMARY, model=text, engine=text, questions=[Question(text, text, text + "x", text)])
    bins = [{"low": 17, "high": 24, "count": 90}, {"low": 129, "high": 192, "count": 18}]
    write_json(run.data_report, asdict(data) | {"length_bins": bins})
    write_summary(run, summary)
    for step in range(1, 21):
        append_metrics(
            run, {"step": step, "loss": 3 / step, "learning_rate": 2e-4 * (1 - step / 20), "grad_norm": 1.0 / step}
        )
    append_metrics(run, {"step": 10, "eval_loss": 0.9})
    if evaluated:
        write_evaluation(run, drawn_evaluation(text or "open_qa"))
    return run
