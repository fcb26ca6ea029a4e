"""Benchmarks through lm-evaluation-harness: base and tuned model, from the hub's tasks or from local files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.disk import read_json, write_json
from gemma_tune.errors import DataError, EngineError, ModelError
from gemma_tune.evaluation.benchmark_table import BENCHMARKS, PAPER_SET, Benchmark
from gemma_tune.evaluation.intervals import share_estimate
from gemma_tune.identity import file_sha256, installed_version
from gemma_tune.inference.target import GgufTarget, Target
from gemma_tune.runs.evaluation import Estimate
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import Reporter
from gemma_tune.text import did_you_mean, utc_now

if TYPE_CHECKING:
    from gemma_tune.inference.load import LoadedTarget

BenchmarkSide = Literal["base", "tuned", "model"]
INSTALL_HINT = "pip install 'gemma-tune[eval]'"

# The first of these that a task reports is shown, where the table of benchmarks does not name one.
_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1")
_OPTION_CODE = "--allow-code"
_SHOT_SEED = 1234  # the harness's default, of which questions serve as examples


@dataclass(frozen=True)
class LocalTask:
    """A file of multiple-choice rows: `question`, `choices`, and `answer` (the choice, or its number from 0)."""

    name: str
    rows: tuple[dict[str, Any], ...]
    sha256: str


@dataclass(frozen=True)
class Chosen:
    """A task to run.

    Attributes:
        name: as the user calls it.
        task: the harness's name, or a file of rows.
        known: its row in the table of benchmarks.
        source: what decides its questions, for a kept result to be compared by.
    """

    name: str
    task: str | LocalTask
    known: Benchmark | None
    source: str


@dataclass(frozen=True)
class BenchmarkSettings:
    """How the tasks are run.

    Attributes:
        shots: examples in front of each question; None takes those of the report, else of the task.
        limit: the first N questions of each task (and of each part of one); None takes all.
        task_dir: a directory with task files: the harness's .yaml, or .jsonl rows.
        allow_code: whether tasks may execute code: programs that the model writes, and local .yaml tasks.
    """

    shots: int | None = None
    limit: int | None = None
    batch_size: int = 8
    task_dir: Path | None = None
    allow_code: bool = False


@dataclass(frozen=True)
class BenchmarkResult:
    """One task on one model.

    Attributes:
        label: as the table of benchmarks writes it.
        shots: that were shown; None: the task's own, which differs between its parts.
        metric: that `value` is of; `metrics` has all of them.
        questions: that were asked.
        key: everything that decides the figures.
    """

    name: str
    label: str
    side: BenchmarkSide
    shots: int | None
    metric: str
    value: Estimate
    metrics: dict[str, float]
    questions: int
    made: str
    key: dict[str, Any]

    @property
    def published(self) -> tuple[float | None, ...] | None:
        known = BENCHMARKS.get(self.name)
        return known.published if known else None


def benchmarks_file(run: RunDir) -> Path:
    return run.path / "benchmarks.json"


def read_benchmarks(run: RunDir) -> list[BenchmarkResult]:
    """The results that a run keeps.

    Raises:
        RunError: their file is damaged.
    """
    if not benchmarks_file(run).is_file():
        return []
    return [
        BenchmarkResult(**{**row, "value": Estimate(**row["value"])})
        for row in read_json(benchmarks_file(run))["results"]
    ]


def require_harness() -> None:
    """Raises EngineError where lm-evaluation-harness is not installed."""
    if installed_version("lm_eval") is None:
        raise EngineError("benchmarks need lm-evaluation-harness, which is not installed", hint=INSTALL_HINT)


# --- tasks ------------------------------------------------------------------------------------------------------------


def choose_tasks(names: Sequence[str], *, settings: BenchmarkSettings) -> tuple[list[Chosen], list[str]]:
    """Resolve names of benchmarks, of local task files and of the harness's own tasks.

    Returns:
        The tasks, and the names that a set was left without because they execute code.

    Raises:
        DataError: an unknown name, a task file that cannot be read, or a named task that executes code without leave.
    """
    local = _local_tasks(settings)
    chosen: dict[str, Chosen] = {}
    left_out = []
    for name in names:
        if _fold(name) != _fold(PAPER_SET):
            item = _choose(name, local, settings=settings)
            chosen[item.name] = item
            continue
        for each, benchmark in BENCHMARKS.items():
            if benchmark.runs_code and not settings.allow_code:
                left_out.append(each)
            else:
                chosen[each] = _choose(each, local, settings=settings)
    return list(chosen.values()), left_out


def _choose(name: str, local: Mapping[str, LocalTask], *, settings: BenchmarkSettings) -> Chosen:
    if name in local:
        # A local file named as a benchmark holds its questions, for a machine without the hub.
        return Chosen(name, local[name], BENCHMARKS.get(name), local[name].sha256)
    by_fold = {_fold(each): each for each in BENCHMARKS} | {_fold(row.task): each for each, row in BENCHMARKS.items()}
    known = by_fold.get(_fold(name))
    if known is not None:
        if BENCHMARKS[known].runs_code and not settings.allow_code:
            raise _runs_code(BENCHMARKS[known].label)
        return Chosen(known, BENCHMARKS[known].task, BENCHMARKS[known], _harness_source(settings))
    manager = _task_manager(settings)
    if name in manager.task_index:
        return Chosen(name, name, None, _harness_source(settings))
    near = did_you_mean(name, [*BENCHMARKS, PAPER_SET, *local, *manager.all_tasks])
    hint = f"benchmarks: {', '.join(BENCHMARKS)}; all of them: {PAPER_SET}; your own: --task-dir DIRECTORY"
    if settings.task_dir is not None and not settings.allow_code and any(settings.task_dir.rglob("*.yaml")):
        hint = f"a .yaml task is a program: read those of {settings.task_dir}, and allow them with {_OPTION_CODE}"
    raise DataError(f"there is no benchmark {name!r}" + (f"; {near}" if near else ""), hint=hint)


def _runs_code(name: str) -> DataError:
    return DataError(
        f"{name} executes programs that the model writes, on this machine",
        hint=f"run it where nothing can be harmed, with {_OPTION_CODE}",
    )


def _fold(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _harness_source(settings: BenchmarkSettings) -> str:
    """The harness's version, and the files that may stand over its own tasks."""
    source = f"lm_eval {installed_version('lm_eval')}"
    if settings.task_dir is None or not settings.allow_code:
        return source
    files = sorted(path for path in settings.task_dir.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{file_sha256(path)}  {path.relative_to(settings.task_dir).as_posix()}\n".encode())
    return f"{source}, {digest.hexdigest()}"


def _local_tasks(settings: BenchmarkSettings) -> dict[str, LocalTask]:
    """The .jsonl files of the task directory, by their names."""
    folder = settings.task_dir
    if folder is None:
        return {}
    if not folder.is_dir():
        raise DataError(f"there is no directory {folder}", hint="--task-dir holds .jsonl rows or the harness's .yaml")
    return {path.stem: _read_local_task(path) for path in sorted(folder.glob("*.jsonl"))}


def _read_local_task(path: Path) -> LocalTask:
    source = open_source(str(path))
    rows = []
    for number, row in enumerate(read_whole(source), start=1):
        question: Any = row.fields.get("question")
        choices: Any = row.fields.get("choices")
        answer: Any = row.fields.get("answer")
        is_listed = isinstance(choices, list) and len(choices) > 1 and all(isinstance(item, str) for item in choices)
        if not isinstance(question, str) or not is_listed:
            raise DataError(
                f"{path}, row {number} is no multiple-choice question",
                hint='{"question": "…", "choices": ["…", "…"], "answer": "…"}',
            )
        index = choices.index(answer) if answer in choices else answer
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
            raise DataError(
                f"{path}, row {number}: the answer {answer!r} is none of its choices",
                hint="give the text of a choice, or its number, counted from 0",
            )
        rows.append({"question": question, "choices": choices, "answer": index})
    return LocalTask(path.stem, tuple(rows), source.sha256)


def _task_manager(settings: BenchmarkSettings, *, with_own_tasks: bool = True) -> Any:
    """The harness's index of tasks; reading its own 14,000 files takes seconds, which local rows do not need.

    A .yaml can name functions, and its Jinja is rendered without a sandbox: none is read without leave.
    """
    from lm_eval.tasks import TaskManager

    include_path = str(settings.task_dir) if settings.task_dir and settings.allow_code else None
    return TaskManager(include_path=include_path, include_defaults=with_own_tasks)


def _harness_task(task: str | LocalTask) -> str | dict[str, Any]:
    """What the harness takes: a name, or a configuration."""
    if isinstance(task, str):
        return task

    def rows(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(task.rows))}

    return {
        "task": task.name,
        "custom_dataset": rows,
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",  # the harness leaves the question itself out of its examples
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


# --- running ----------------------------------------------------------------------------------------------------------


def run_benchmarks(
    target: Target | GgufTarget,
    tasks: Sequence[Chosen],
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
        GemmaTuneError: the rows of a task cannot be had, or the model cannot be loaded.
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
        reporter.detail(f"{len(done)} of {len(wanted)} results are kept from before; --again makes them anew")
    open_ones = [item for item in wanted if (item[0].name, item[1]) not in done]
    if open_ones:
        manager = _task_manager(settings, with_own_tasks=any(isinstance(item[0].task, str) for item in open_ones))
        with _code_allowed(settings.allow_code):
            _require_rows(manager, [chosen for chosen, _, _ in open_ones], allow_code=settings.allow_code)
            loaded, harness = _load(target, batch_size=settings.batch_size, reporter=reporter)
            for chosen, side, key in open_ones:
                reporter.stage(f"{chosen.known.label if chosen.known else chosen.name}, {side}")
                with contextlib.ExitStack() as stack:
                    if side == "base":
                        stack.enter_context(loaded.model.disable_adapter())
                    result = _run_task(harness, manager, chosen, side=side, key=key, settings=settings)
                done[chosen.name, side] = result
                if run is not None:
                    kept[_place(result)] = result
                    write_json(benchmarks_file(run), {"results": [asdict(each) for each in kept.values()]})
    return [done[chosen.name, side] for chosen, side, _ in wanted]


def _place(result: BenchmarkResult) -> tuple[str, str, Any, Any]:
    """Results of one task with other shots or another limit stand beside each other."""
    return result.name, result.side, result.key["shots"], result.key["limit"]


def _key(
    chosen: Chosen, side: BenchmarkSide, identity: Mapping[str, Any], settings: BenchmarkSettings
) -> dict[str, Any]:
    """Everything that decides a figure. The batch size is not among it: it moves a likelihood in its last digits."""
    model = {**identity, "template": None, "adapter": {} if side == "base" else identity["adapter"]}
    key = {
        "task": chosen.task if isinstance(chosen.task, str) else chosen.task.name,
        "source": chosen.source,
        "shots": _shots(chosen, settings),
        "limit": settings.limit,
        "model": model,
        "packages": {name: installed_version(name) for name in ("lm_eval", "torch", "transformers")},
    }
    return dict(json.loads(json.dumps(key)))  # as it is read back


def _shots(chosen: Chosen, settings: BenchmarkSettings) -> int | None:
    if settings.shots is not None:
        return settings.shots
    return chosen.known.shots if chosen.known else None


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """`evaluate`'s code_eval, which HumanEval and MBPP score with, asks for this variable."""
    if not allowed:
        yield
        return
    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _require_rows(manager: Any, tasks: Sequence[Chosen], *, allow_code: bool) -> None:
    """Have the rows of every task here before a model is loaded."""
    for chosen in {chosen.name: chosen for chosen in tasks}.values():
        try:
            loaded = manager.load([_harness_task(chosen.task)])
        except Exception as error:  # of any library that a task file names
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"the task {chosen.name} cannot be prepared: {told[0]}",
                hint="the harness's tasks take their rows from the Hugging Face hub; without it, give --task-dir",
            ) from error
        if not allow_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise _runs_code(chosen.name)


def _load(target: Target, *, batch_size: int, reporter: Reporter) -> tuple[LoadedTarget, Any]:
    """The model as our loader makes it, 4 bits and adapter as trained and no code of a repository, for the harness."""
    from lm_eval.models.huggingface import HFLM

    from gemma_tune.inference.load import load_target

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
    chosen: Chosen,
    *,
    side: BenchmarkSide,
    key: dict[str, Any],
    settings: BenchmarkSettings,
) -> BenchmarkResult:
    from lm_eval.evaluator import evaluate

    name = chosen.task if isinstance(chosen.task, str) else chosen.task.name
    loaded = manager.load([_harness_task(chosen.task)])
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
        label=chosen.known.label if chosen.known else chosen.name,
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
