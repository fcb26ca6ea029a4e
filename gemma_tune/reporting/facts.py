"""Gather what a report says of a run from the files of its directory; a file that is not there yet is left out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json
from gemma_tune.errors import RunError
from gemma_tune.reporting.charts import Point, points_of, smoothed
from gemma_tune.runs.evaluation import METRICS, Evaluation, format_estimate, read_evaluation
from gemma_tune.runs.index import describe_state
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import Manifest
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.summary import Question, RunSummary, read_summary
from gemma_tune.text import format_bytes, format_seconds, in_shell
from gemma_tune.yaml_io import read_yaml

# Settings in which two runs differ without learning otherwise.
_NOT_COMPARED = ("run.name", "run.output_dir")


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    name: str
    path: Path  # of its directory, as it was given
    manifest: Manifest
    lock: Mapping[str, Any] | None  # lock, data, plan: as their JSON files have them
    data: Mapping[str, Any] | None
    plan: Mapping[str, Any] | None
    summary: RunSummary | None
    evaluation: Evaluation | None
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    recipe: str  # the resolved recipe, as text
    settings: Mapping[str, Any]  # the same as `section.field` → value

    def points(self, field: str) -> list[Point]:
        """A logged figure by step."""
        return points_of(self.metrics, field)

    @property
    def smooth_loss(self) -> list[Point]:
        return smoothed(self.points("loss"))

    @property
    def eval_losses(self) -> list[Point]:
        """Those while training, between the one before it, at step 0, and the one after it."""
        points = self.points("eval_loss")
        if self.summary is None:
            return points
        ends = ((0, self.summary.eval_loss_before), (self.summary.steps, self.summary.eval_loss_after))
        found = {step: loss for step, loss in ends if loss is not None} | dict(points)
        return sorted(found.items())

    @property
    def headline(self) -> str:
        """Model, engine and precision in a line."""
        if self.summary is not None:
            summary = self.summary
            return f"{summary.model} · {summary.engine} · {summary.quantization} · {summary.precision}"
        return str(self.settings.get("model.name", ""))

    @property
    def results(self) -> list[tuple[str, str]]:
        """Return what came out, as label and value."""
        state: str = self.manifest.status
        if self.manifest.total_steps:
            state += f", step {self.manifest.step:,} of {self.manifest.total_steps:,}"
        rows = [("status", state)]
        summary = self.summary
        if summary is None:
            return rows
        loss = before_after(summary.eval_loss_before, summary.eval_loss_after, form=".3f", rows=summary.eval_rows)
        before, after = summary.exact_match_before, summary.exact_match_after
        trained, total = format_seconds(summary.training_seconds), format_seconds(summary.total_seconds)
        return [
            *rows,
            ("eval loss, nats a token", loss),
            ("exact match", before_after(before, after, form=".1%", rows=summary.exact_match_rows)),
            ("training loss, last tenth", f"{summary.train_loss:.3f}"),
            ("rows", f"{summary.train_rows:,} trained, {summary.eval_rows:,} held out"),
            ("trained parameters", f"{summary.num_trainable:,}"),
            ("tokens", f"{summary.num_tokens:,}"),
            ("time of training", f"{trained} of {total}"),
            ("speed", f"{summary.tokens_per_second:,.0f} tokens/s"),
            ("peak memory", format_bytes(summary.peak_memory_bytes)),
        ]

    @property
    def warnings(self) -> list[str]:
        """Return what a reader of the figures has to know, the worst first."""
        found = []
        if self.manifest.status != "finished":
            why = f": {self.manifest.error}" if self.manifest.error else ""
            found.append(f"the run is {self.manifest.status}{why}")
        if self.evaluation is not None:
            forgetting = self.evaluation.general[0].figure("loss")
            if forgetting is not None and forgetting.verdict == "worse":
                moved = format_estimate(forgetting.difference, metric="loss", signed=True)
                general = self.evaluation.general_label
                found.append(f"general text got less likely: loss {moved} nats a token on {general}")
        losses = self.eval_losses
        if losses:
            best_step, best = min(losses, key=lambda point: point[1])
            last = losses[-1][1]
            if last > best * 1.02:
                found.append(f"the eval loss rose again: {best:.3f} at step {best_step:,.0f}, {last:.3f} at the end")
        skipped = sum("loss" in row and row["loss"] is None for row in self.metrics)
        if skipped:
            found.append(f"{skipped:,} logged steps have no finite loss")
        data = self.data
        if data is not None:
            counts = [
                (data["rows_bad"], "rows could not be used"),
                (data["dropped_too_long"], f"rows are longer than {data['max_seq_tokens']:,} tokens and were left out"),
                (data["truncated"], "prompts were cut to fit"),
                (data["truncated_answers"], "answers were cut to fit"),
                (data["num_leaked"], "train rows were left out, being eval rows, too"),
                (data["control_strings"], f"control tokens are spelled out in row text, read as {data['control_as']}"),
                *((count, f"rows left out: {reason}") for reason, count in data["left_out"].items()),
            ]
            found += [f"{count:,} {what}" for count, what in counts if count]
            found += data["notes"]
        return found

    @property
    def steps(self) -> list[str]:
        """Return commands that re-run it, each with what it does."""
        packages = (self.lock or {}).get("packages", {})
        pins = " ".join(
            f"{name}=={version.split('+')[0]}" for name, version in packages.items() if version and name != "gemma-tune"
        )
        path = in_shell(self.path)
        return [
            *([f"pip install {pins}"] if pins else []),
            f"gemma-tune train {path}/resolved.yaml run.name={self.name}-again  # the same recipe as a new run",
            f"gemma-tune reproduce {path}  # the same, and compares the adapters bit for bit",
        ]


def gather_facts(run: RunDir) -> RunFacts:
    """Read a run directory.

    Raises:
        RunError: a file of it is damaged.
    """
    from gemma_tune.runs.lock import read_lock  # here: it knows the recipe, and --help loads no pydantic

    recipe = run.resolved_recipe.read_text(encoding="utf-8") if run.resolved_recipe.is_file() else ""
    return RunFacts(
        name=run.path.resolve().name,
        path=run.path,
        manifest=describe_state(run),
        lock=read_lock(run) if run.lock.is_file() else None,
        data=read_json(run.data_report) if run.data_report.is_file() else None,
        plan=read_json(run.plan) if run.plan.is_file() else None,
        summary=read_summary(run) if run.summary.is_file() else None,
        evaluation=read_evaluation(run),
        metrics=read_metrics(run),
        recipe=recipe,
        settings=_flat(read_yaml(recipe, label=str(run.resolved_recipe), error=RunError)[0] or {}),
    )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, fields in values.items()
        for name, value in (fields.items() if isinstance(fields, Mapping) else [("", fields)])
    }


def differing_settings(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, with the value of each; `—` where a recipe has none."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _NOT_COMPARED)
    rows = [(name, [_written(run.settings[name]) if name in run.settings else "—" for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _written(value: object) -> str:
    """Return a value as YAML has it, on one line."""
    if isinstance(value, list):
        return ", ".join(map(_written, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def results_side_by_side(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Return every result, with the value of each run."""
    columns = [dict(run.results) for run in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, "—") for column in columns]) for label in labels]


def before_after(before: float | None, after: float | None, *, form: str, rows: int | None = None) -> str:
    """Return `2.235 → 0.069 (115 rows)`; one value where there is one, `—` where there is none."""
    written = [format(value, form).replace("%", " %") for value in (before, after) if value is not None]
    if not written:
        return "—"
    return " → ".join(written) + ("" if rows is None else f" ({rows:,} rows)")


def evaluations_side_by_side(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Return every metric that a run has, with the figure of each tuned model on all its rows."""
    groups = [run.evaluation.rows[0] if run.evaluation else None for run in runs]
    rows = []
    for metric, described in METRICS.items():
        figures = [group.figure(metric) if group else None for group in groups]
        if any(figures):
            tuned = [format_estimate(each.tuned if each else None, metric=metric) for each in figures]
            rows.append((described.label, tuned))
    return rows


def questions_side_by_side(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return every question with the base's answer and that of each run that was asked it: label, text, is right."""
    asked: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
    for run in runs:
        label = "after" if len(runs) == 1 else run.name
        for item in run.summary.questions if run.summary else ():
            answers = asked.setdefault((item.question, item.expected), [_answer("before", item.before, item)])
            answers.append(_answer(label, item.after, item))
    return [{"question": text, "expected": right, "answers": answers} for (text, right), answers in asked.items()]


def _answer(label: str, text: str, asked: Question) -> tuple[str, str, bool]:
    return label, text, text.split() == asked.expected.split()
