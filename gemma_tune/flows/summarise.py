"""What came out of a training: its answers, summary and loss curve (matplotlib is imported when it draws)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.disk import to_json_lines, write_text
from gemma_tune.flows.decide import Decisions
from gemma_tune.reporting.loss_curve import draw_loss_curve
from gemma_tune.runs.adapter_base import write_base_record
from gemma_tune.runs.adapter_dir import TEMPLATE_FILE
from gemma_tune.runs.summary import Question, RunSummary, write_summary
from gemma_tune.training.parts import TrainerParts

if TYPE_CHECKING:
    from gemma_tune.inference.generate import Completion
    from gemma_tune.training.train_adapter import TrainingResult


def describe_adapter(directory: Path, decisions: Decisions) -> None:
    """Write next to an adapter the template that it is asked with, and what it was trained on."""
    write_text(directory / TEMPLATE_FILE, decisions.inputs.template.source_text)
    write_base_record(directory, decisions.base)


def summarise(
    decisions: Decisions,
    parts: TrainerParts,
    result: TrainingResult,
    *,
    before: Sequence[Completion],
    after: Sequence[Completion],
) -> None:
    """Write answers.jsonl, summary.json and the loss curve into the run."""
    from gemma_tune.evaluation.answers import choose_examples, pair_answers, spread_over_categories

    run, section, datasets = parts.context.run, decisions.recipe.evaluation, parts.datasets
    answers = pair_answers(choose_examples(datasets.eval_examples, section=section), before, after)
    write_text(run.answers, to_json_lines(map(asdict, answers)))
    count = len(answers) if section.exact_match else 0
    summary = RunSummary(
        model=decisions.base.name,
        engine=decisions.engine.choice.name,
        quantization=decisions.quantization,
        precision=decisions.engine.precision.compute,
        train_rows=len(datasets.train),
        eval_rows=len(datasets.eval),
        dropped_rows=datasets.report.dropped_too_long,
        num_trainable=result.num_trainable,
        steps=result.steps,
        training_seconds=result.seconds,
        total_seconds=time.monotonic() - decisions.started,
        num_tokens=result.num_tokens,
        peak_memory_bytes=result.peak_memory_bytes,
        train_loss=result.train_loss,
        eval_loss_before=result.eval_loss_before,
        eval_loss_after=result.eval_loss_after,
        exact_match_before=sum(row.before_matches for row in answers) / count if count else None,
        exact_match_after=sum(row.after_matches for row in answers) / count if count else None,
        exact_match_rows=count,
        questions=[
            Question(row.question, row.expected, row.before, row.after)
            for row in spread_over_categories(answers, count=section.num_questions)
        ],
    )
    write_summary(run, summary)
    draw_loss_curve(run)
