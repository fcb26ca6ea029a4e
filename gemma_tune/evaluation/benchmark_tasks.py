"""The tasks of a benchmark run: named ones of lm-evaluation-harness, and files of the user's own."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.errors import DataError, EngineError
from gemma_tune.evaluation.benchmark_table import BENCHMARKS, PAPER_SET, Benchmark
from gemma_tune.identity import file_sha256, installed_version, text_sha256
from gemma_tune.paths import read_table
from gemma_tune.text import suggestion

INSTALL_HINT = "pip install 'lm-eval[math]==0.4.13'"
_OPTION_CODE = "--allow-code"


@dataclass(frozen=True)
class ChosenTask:
    """A task to run."""

    name: str  # as the user calls it
    task: str  # the harness's name, or that of a file of rows
    known: Benchmark | None  # its row in the table of benchmarks
    source: str  # what decides its questions, for a kept result to be compared by
    # of a file of multiple-choice questions, each with `question`, `choices` and the number of the `answer`; None where
    # the harness has its own
    rows: tuple[dict[str, Any], ...] | None = None

    @property
    def label(self) -> str:
        """As the table of benchmarks writes it."""
        return self.known.label if self.known else self.name

    def for_harness(self) -> str | dict[str, Any]:
        """What the harness takes: a name, or a configuration."""
        if self.rows is None:
            return self.task
        rows = list(self.rows)

        def dataset(**_: Any) -> dict[str, Any]:
            from datasets import Dataset

            return {"test": Dataset.from_list(rows)}

        return {"task": self.task, "custom_dataset": dataset, **read_table("evaluation/choice_task.toml")}


@dataclass(frozen=True)
class BenchmarkSettings:
    """How the tasks are run."""

    shots: int | None = None  # examples in front of each question; None takes those of the report, else of the task
    limit: int | None = None  # the first N questions of each task (and of each part of one); None takes all
    batch_size: int = 8
    task_dir: Path | None = None  # a directory with task files: the harness's .yaml, or .jsonl rows
    allow_code: bool = False  # whether tasks may execute code: programs that the model writes, and local .yaml tasks


def require_harness() -> None:
    """Raises EngineError where lm-evaluation-harness is not installed."""
    if installed_version("lm_eval") is None:
        raise EngineError("benchmarks need lm-evaluation-harness, which is not installed", hint=INSTALL_HINT)


def choose_tasks(names: Sequence[str], *, settings: BenchmarkSettings) -> tuple[list[ChosenTask], list[str]]:
    """Resolve names of benchmarks, of local task files and of the harness's own tasks.

    Returns:
        The tasks, and the names that a set was left without because they execute code.

    Raises:
        DataError: an unknown name, a task file that cannot be read, or a named task that executes code without leave.
    """
    local = _local_tasks(settings)
    chosen: dict[str, ChosenTask] = {}
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


def _choose(name: str, local: Mapping[str, ChosenTask], *, settings: BenchmarkSettings) -> ChosenTask:
    if name in local:
        # A local file named as a benchmark holds its questions, for a machine without the hub.
        return local[name]
    by_fold = {_fold(each): each for each in BENCHMARKS} | {_fold(row.task): each for each, row in BENCHMARKS.items()}
    known = by_fold.get(_fold(name))
    if known is not None:
        if BENCHMARKS[known].runs_code and not settings.allow_code:
            raise _runs_code(BENCHMARKS[known].label)
        return ChosenTask(known, BENCHMARKS[known].task, BENCHMARKS[known], _harness_source(settings))
    manager = task_manager(settings)
    if name in manager.task_index:
        return ChosenTask(name, name, None, _harness_source(settings))
    near = suggestion(name, [*BENCHMARKS, PAPER_SET, *local, *manager.all_tasks])
    hint = f"benchmarks: {', '.join(BENCHMARKS)}; all of them: {PAPER_SET}; your own: --task-dir DIRECTORY"
    if settings.task_dir is not None and not settings.allow_code and any(settings.task_dir.rglob("*.yaml")):
        hint = f"a .yaml task is a program: read those of {settings.task_dir}, and allow them with {_OPTION_CODE}"
    raise DataError(f"there is no benchmark {name!r}{near}", hint=hint)


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
    lines = [f"{file_sha256(path)}  {path.relative_to(settings.task_dir).as_posix()}\n" for path in files]
    return f"{source}, {text_sha256(''.join(lines))}"


def _local_tasks(settings: BenchmarkSettings) -> dict[str, ChosenTask]:
    """The .jsonl files of the task directory, by their names."""
    folder = settings.task_dir
    if folder is None:
        return {}
    if not folder.is_dir():
        raise DataError(f"there is no directory {folder}", hint="--task-dir holds .jsonl rows or the harness's .yaml")
    return {path.stem: _read_local_task(path) for path in sorted(folder.glob("*.jsonl"))}


def _read_local_task(path: Path) -> ChosenTask:
    source = open_source(str(path))
    rows = []
    for number, row in enumerate(read_whole(source), start=1):
        question: Any = row.fields.get("question")
        choices: Any = row.fields.get("choices")
        answer: Any = row.fields.get("answer")
        is_listed = isinstance(choices, list) and len(choices) > 1 and all(isinstance(item, str) for item in choices)
        if not isinstance(question, str) or not is_listed:
            raise DataError(
                f"{path}, row {number} is not a multiple-choice question",
                hint='{"question": "…", "choices": ["…", "…"], "answer": "…"}',
            )
        index = choices.index(answer) if answer in choices else answer
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
            raise DataError(
                f"{path}, row {number}: the answer {answer!r} is not one of its choices",
                hint="give the text of a choice, or its number, counted from 0",
            )
        rows.append({"question": question, "choices": choices, "answer": index})
    return ChosenTask(path.stem, path.stem, BENCHMARKS.get(path.stem), source.sha256, tuple(rows))


def task_manager(settings: BenchmarkSettings, *, with_own_tasks: bool = True) -> Any:
    """The harness's index of tasks; reading its own 14,000 files takes seconds, which local rows do not need.

    A .yaml can name functions, and its Jinja is rendered without a sandbox: none is read without leave.
    """
    from lm_eval.tasks import TaskManager

    include_path = str(settings.task_dir) if settings.task_dir and settings.allow_code else None
    return TaskManager(include_path=include_path, include_defaults=with_own_tasks)


def require_rows(manager: Any, tasks: Sequence[ChosenTask], *, allow_code: bool) -> None:
    """Have the rows of every task here before a model is loaded."""
    for chosen in {chosen.name: chosen for chosen in tasks}.values():
        try:
            loaded = manager.load([chosen.for_harness()])
        except Exception as error:  # of any library that a task file names
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"the task {chosen.name} cannot be prepared: {lines[0]}",
                hint="the harness's tasks take their rows from the Hugging Face hub; without it, give --task-dir",
            ) from error
        if not allow_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise _runs_code(chosen.name)


@contextlib.contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
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
