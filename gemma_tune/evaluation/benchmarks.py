"""Benchmarks through lm-evaluation-harness: base and tuned model, from the hub's tasks or from local files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from gemma_tune.disk import read_json, write_json
from gemma_tune.errors import DataError, ModelError
from gemma_tune.evaluation.benchmark_table import BENCHMARKS
from gemma_tune.evaluation.benchmark_tasks import (
    BenchmarkSettings,
    ChosenTask,
    code_allowed,
    require_rows,
    task_manager,
)
from gemma_tune.evaluation.intervals import share_estimate
from gemma_tune.identity import installed_version
from gemma_tune.inference.target import GgufTarget, Target
from gemma_tune.runs.evaluation import Estimate
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import Reporter
from gemma_tune.text import utc_now

if TYPE_CHECKING:
    from gemma_tune.inference.load_target import LoadedTarget

BenchmarkSide = Literal["base", "tuned", "model"]
# The first of these that a task reports is shown, where the table of benchmarks does not name one.
_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1")
_SHOT_SEED = 1234  # the harness's default, of which questions serve as examples


@dataclass(frozen=True)
class BenchmarkResult:
    """One task on one model."""

    name: str
    label: str  # as the table of benchmarks writes it
    side: BenchmarkSide
    shots: int | None  # that were shown; None: the task's own, which differs between its parts
    metric: str  # that `value` is of; `metrics` has all of them
    value: Estimate
    metrics: dict[str, float]
    questions: int  # that were asked
    made: str
    key: dict[str, Any]  # everything that decides the figures

    @property
    def published(self) -> tuple[float | None, ...] | None:
        known = BENCHMARKS.get(self.name)
        return known.published if known else None


def read_benchmarks(run: RunDir) -> list[BenchmarkResult]:
    """The results that a run keeps.

    Raises:
        RunError: their file is damaged.
    """
    if not run.benchmarks.is_file():
        return []
    return TypeAdapter(list[BenchmarkResult]).validate_python(read_json(run.benchmarks)["results"])


def run_benchmarks(
    target: Target | GgufTarget,
    tasks: Sequence[ChosenTask],
    *,
    settings: BenchmarkSettings,
    run: RunDir | None,
    reporter: Reporter,
    again: bool = False,
) -> list[BenchmarkResult]:
    """Run tasks on a model, and on its base where it is an adapter.

    Args:
        run: keeps every result at once; one that it has, made of the same, is not made again unless `again`.

    Returns:
        A result for every task and side, in the order of the tasks.

    Raises:
        GemmaTuneError: the rows of a task are not available, or the model cannot be loaded.
    """
    if isinstance(target, GgufTarget):
        raise ModelError("a GGUF is not benchmarked here", hint="give the run, or the merged directory it was made of")
    sides: tuple[BenchmarkSide, ...] = ("base", "tuned") if target.adapter is not None else ("model",)
    identity = target.identity()
    kept = {} if run is None else {_place(result): result for result in read_benchmarks(run)}
    wanted = [(chosen, side, _key(chosen, side, identity, settings)) for chosen in tasks for side in sides]
    done = {
        (chosen.name, side): result
        for chosen, side, key in wanted
        for result in kept.values()
        if not again and (result.name, result.side, result.key) == (chosen.name, side, key)
    }
    if done:
        reporter.detail(f"{len(done)} of {len(wanted)} results are kept from before; --again measures them again")
    open_ones = [item for item in wanted if (item[0].name, item[1]) not in done]
    if open_ones:
        manager = task_manager(settings, with_own_tasks=any(item[0].rows is None for item in open_ones))
        with code_allowed(settings.allow_code):
            require_rows(manager, [chosen for chosen, _, _ in open_ones], allow_code=settings.allow_code)
            loaded, harness = _load(target, batch_size=settings.batch_size, reporter=reporter)
            for chosen, side, key in open_ones:
                reporter.stage(f"{chosen.label}, {side}")
                with loaded.model.disable_adapter() if side == "base" else contextlib.nullcontext():
                    result = _run_task(harness, manager, chosen, side=side, key=key, settings=settings)
                done[chosen.name, side] = result
                if run is not None:
                    kept[_place(result)] = result
                    write_json(run.benchmarks, {"results": [asdict(each) for each in kept.values()]})
    return [done[chosen.name, side] for chosen, side, _ in wanted]


def _place(result: BenchmarkResult) -> tuple[str, str, Any, Any]:
    """Results of one task with other shots or another limit are kept next to each other."""
    return result.name, result.side, result.key["shots"], result.key["limit"]


def _key(
    chosen: ChosenTask, side: BenchmarkSide, identity: Mapping[str, Any], settings: BenchmarkSettings
) -> dict[str, Any]:
    """Everything that decides a figure. The batch size is not among it: it moves a likelihood in its last digits."""
    model = {**identity, "template": None, "adapter": {} if side == "base" else identity["adapter"]}
    key = {
        "task": chosen.task,
        "source": chosen.source,
        "shots": _shots(chosen, settings),
        "limit": settings.limit,
        "model": model,
        "packages": {name: installed_version(name) for name in ("lm_eval", "torch", "transformers")},
    }
    return dict(json.loads(json.dumps(key)))  # as it is read back


def _shots(chosen: ChosenTask, settings: BenchmarkSettings) -> int | None:
    if settings.shots is not None:
        return settings.shots
    return chosen.known.shots if chosen.known else None


def _load(target: Target, *, batch_size: int, reporter: Reporter) -> tuple[LoadedTarget, Any]:
    """The model as our loader makes it, 4 bits and adapter as trained and no code of a repository, for the harness."""
    from lm_eval.models.huggingface import HFLM

    from gemma_tune.inference.load_target import load_target

    reporter.stage("model")
    loaded = load_target(target)
    harness = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=target.base.config.context_tokens,
        add_bos_token=True,
    )
    # Without its BOS a Gemma's figures mean nothing (F12).
    if harness.tok_encode("a")[0] != loaded.tokenizer.bos_token_id:
        raise ModelError(
            f"the tokenizer of {target.base.name} puts no BOS in front of a text, so the harness would not either",
            hint="set add_bos_token to true in its tokenizer_config.json",
        )
    return loaded, harness


def _run_task(
    harness: Any,
    manager: Any,
    chosen: ChosenTask,
    *,
    side: BenchmarkSide,
    key: dict[str, Any],
    settings: BenchmarkSettings,
) -> BenchmarkResult:
    from lm_eval.evaluator import evaluate

    name = chosen.task
    loaded = manager.load([chosen.for_harness()])
    for task in loaded["tasks"].values():
        own_shots = task.get_config("num_fewshot")
        # As the harness's own simple_evaluate has it, which asks git for a commit besides: a task that says 0 keeps it.
        if own_shots != 0:
            task.set_config(key="num_fewshot", value=own_shots or 0 if key["shots"] is None else key["shots"])
        task.set_fewshot_seed(seed=_SHOT_SEED)
    found = evaluate(
        lm=harness,
        task_dict=loaded,
        limit=settings.limit,
        log_samples=False,
        bootstrap_iters=0,
        confirm_run_unsafe_code=settings.allow_code,
    )
    metrics = {
        metric.removesuffix(",none"): float(value)
        for metric, value in found["results"][name].items()
        if isinstance(value, int | float) and "," in metric and "_stderr" not in metric
    }
    questions = sum(count["effective"] for count in found["n-samples"].values())
    metric = chosen.known.metric if chosen.known else ""
    if metric not in metrics:  # a task of the user's own has its own
        metric = _main_metric(metrics, task=name)
    value = metrics[metric]
    shots = {found["n-shot"][part] for part in found["n-samples"]}
    return BenchmarkResult(
        name=chosen.name,
        label=chosen.label,
        side=side,
        shots=shots.pop() if len(shots) == 1 else None,
        metric=metric,
        # Wilson's interval is for shares; a perplexity has none.
        value=share_estimate(value, num_rows=questions) if 0 <= value <= 1 else Estimate(value, None, None),
        metrics=metrics,
        questions=questions,
        made=utc_now(),
        key=key,
    )


def _main_metric(metrics: Mapping[str, float], *, task: str) -> str:
    for wanted in _MAIN_METRICS:
        for metric in metrics:
            if metric.split(",")[0] == wanted:
                return metric
    if not metrics:
        raise DataError(f"the task {task} reports no figure", hint="give it a metric_list")
    return next(iter(metrics))
