"""Benchmarks on local tasks with the real harness; skipped where it is not installed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gemma_tune import load
from gemma_tune.errors import DataError, EngineError, ModelError
from gemma_tune.evaluation import benchmark_tasks, benchmarks
from gemma_tune.evaluation.benchmark_table import BENCHMARKS, PAPER_SET
from gemma_tune.evaluation.benchmark_tasks import BenchmarkSettings, choose_tasks, require_harness
from gemma_tune.evaluation.benchmarks import read_benchmarks, run_benchmarks
from gemma_tune.inference.target import find_target
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import SilentReporter
from tests.evaluation.conftest import DrawnRun

NUM_QUESTIONS = 12


@pytest.fixture(scope="session")
def _harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


needs_harness = pytest.mark.usefixtures("_harness")


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """Multiple-choice questions on the tiny world, in a file named as a benchmark."""
    draw = random.Random(3)
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = []
    for number in range(NUM_QUESTIONS):
        choices = draw.sample(["bread", "a boat", "shoes of leather", "horseshoes", "cheese and butter"], 4)
        answer: Any = draw.randrange(4)
        rows.append({"question": f"What is made in house {number}?", "choices": choices, "answer": answer})
    rows[0]["answer"] = rows[0]["choices"][rows[0]["answer"]]  # by its text
    (folder / "arc-e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(drawn_run: DrawnRun, tmp_path: Path) -> RunDir:
    """A copy, to keep results in."""
    return RunDir(Path(shutil.copytree(drawn_run.run.path, tmp_path / "run-001")))


def accuracies(name: str, file: Path, *, without_adapter: bool) -> dict[str, float]:
    """The harness's two accuracies in plain transformers: the likeliest choice, and the likeliest for its length."""
    model = load(name, without_adapter=without_adapter).model
    tokenizer = AutoTokenizer.from_pretrained(Path(name) / "adapter")
    right = {"acc": 0, "acc_norm": 0}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        answer = row["answer"] if isinstance(row["answer"], int) else row["choices"].index(row["answer"])
        scores = []
        for choice in row["choices"]:
            text = f"Question: {row['question']}\nAnswer:"
            start = len(tokenizer.encode(text, add_special_tokens=False))
            ids = [tokenizer.bos_token_id, *tokenizer.encode(f"{text} {choice}", add_special_tokens=False)]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at, ids[at + 1]]) for at in range(start, len(ids) - 1)))
        norm = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == answer
        right["acc_norm"] += norm.index(max(norm)) == answer
    return {name: count / len(rows) for name, count in right.items()}


@needs_harness
def test_a_local_task_on_base_and_tuned(run: RunDir, task_dir: Path) -> None:
    settings = BenchmarkSettings(task_dir=task_dir, batch_size=4)
    target = find_target(str(run.path))
    tasks, left_out = choose_tasks(["arc-e"], settings=settings)
    assert left_out == []
    results = run_benchmarks(target, tasks, settings=settings, run=run, reporter=SilentReporter())
    assert [(result.side, result.questions, result.label, result.shots) for result in results] == [
        ("base", NUM_QUESTIONS, "ARC-e", 0), ("tuned", NUM_QUESTIONS, "ARC-e", 0),
    ]  # fmt: skip
    for result in results:
        wanted = accuracies(str(run.path), task_dir / "arc-e.jsonl", without_adapter=result.side == "base")
        assert result.metrics == pytest.approx(wanted)
        assert result.metric == "acc" and result.value.value == pytest.approx(wanted["acc"])
        assert result.published == (73.2, 81.5, 80.5)
    assert read_benchmarks(run) == results


@needs_harness
def test_only_what_changed_is_made_again(run: RunDir, task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []
    real = benchmarks._run_task

    def counted(harness: Any, manager: Any, chosen: Any, *, side: Any, **arguments: Any) -> Any:
        made.append((chosen.name, side))
        return real(harness, manager, chosen, side=side, **arguments)

    monkeypatch.setattr(benchmarks, "_run_task", counted)

    def measure(*, again: bool = False, **changes: Any) -> list[tuple[str, str]]:
        made.clear()
        settings = BenchmarkSettings(**{"task_dir": task_dir, "limit": 3, **changes})
        tasks, _ = choose_tasks([path.stem for path in sorted(task_dir.glob("*.jsonl"))], settings=settings)
        target = find_target(str(run.path))
        run_benchmarks(target, tasks, settings=settings, run=run, reporter=SilentReporter(), again=again)
        return list(made)

    assert measure() == [("arc-e", "base"), ("arc-e", "tuned")]
    assert measure() == []
    assert measure(batch_size=1) == []
    shutil.copy(task_dir / "arc-e.jsonl", task_dir / "mine.jsonl")
    assert measure() == [("mine", "base"), ("mine", "tuned")]
    adapter = run.adapter / "adapter_config.json"
    adapter.write_text(adapter.read_text() + " ")  # another adapter, the same base
    assert measure() == [("arc-e", "tuned"), ("mine", "tuned")]
    assert measure(limit=2) == [(name, side) for name in ("arc-e", "mine") for side in ("base", "tuned")]
    assert measure() == []  # results with another limit stand beside each other
    lines = (task_dir / "mine.jsonl").read_text().splitlines(keepends=True)
    (task_dir / "mine.jsonl").write_text("".join(lines[::-1]))
    assert measure() == [("mine", "base"), ("mine", "tuned")]
    assert len(json.loads(run.benchmarks.read_text())["results"]) == 8


@needs_harness
def test_a_yaml_of_the_harness_with_shots(task_dir: Path, tmp_path: Path) -> None:
    (task_dir / "own.yaml").write_text(
        "task: own_yaml\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {task_dir / 'arc-e.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\nfewshot_split: test\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: choices\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    lines = (task_dir / "arc-e.jsonl").read_text().splitlines(keepends=True)
    (task_dir / "arc-e.jsonl").write_text("".join(lines[1:]))  # the first has a text where the others have a number
    with pytest.raises(DataError, match=r"there is no benchmark 'own_yaml'") as told:
        choose_tasks(["own_yaml"], settings=BenchmarkSettings(task_dir=task_dir))
    assert told.value.hint == f"a .yaml task is a program: read those of {task_dir}, and allow them with --allow-code"
    settings = BenchmarkSettings(task_dir=task_dir, limit=4, shots=2, allow_code=True)
    tasks, _ = choose_tasks(["own_yaml"], settings=settings)
    (result,) = run_benchmarks(
        find_target("gemma-tiny", default_template="completion"),
        tasks,
        settings=settings,
        run=None,
        reporter=SilentReporter(),
    )
    assert (result.side, result.shots, result.questions, result.published) == ("model", 2, 4, None)


@needs_harness
def test_every_benchmark_is_a_task_of_the_harness() -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().task_index
    assert {row.task for row in BENCHMARKS.values()} <= set(known)
    runs_code = {name for name, row in BENCHMARKS.items() if "unsafe_code" in known[row.task].yaml_path.read_text()}
    assert runs_code == {name for name, row in BENCHMARKS.items() if row.runs_code} == {"humaneval", "mbpp"}


@needs_harness
def test_code_needs_leave() -> None:
    with pytest.raises(DataError, match=r"HumanEval executes programs that the model writes"):
        choose_tasks(["HumanEval"], settings=BenchmarkSettings())
    assert choose_tasks(["humaneval"], settings=BenchmarkSettings(allow_code=True))[0][0].task == "humaneval"
    tasks, left_out = choose_tasks([PAPER_SET], settings=BenchmarkSettings())
    assert left_out == ["humaneval", "mbpp"] and len(tasks) == len(BENCHMARKS) - 2


@needs_harness
def test_names(task_dir: Path) -> None:
    tasks, _ = choose_tasks(["MMLU", "arc_easy", "ARC-C", "lambada_openai", "mmlu"], settings=BenchmarkSettings())
    assert [(task.name, task.task) for task in tasks] == [
        ("mmlu", "mmlu"), ("arc-e", "arc_easy"), ("arc-c", "arc_challenge"), ("lambada_openai", "lambada_openai"),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no benchmark 'helaswag'; did you mean 'hellaswag'"):
        choose_tasks(["helaswag"], settings=BenchmarkSettings())
    with pytest.raises(DataError, match=r"there is no directory"):
        choose_tasks(["x"], settings=BenchmarkSettings(task_dir=task_dir / "none"))


@needs_harness
def test_without_the_hub_it_says_so() -> None:
    settings = BenchmarkSettings()
    tasks, _ = choose_tasks(["piqa"], settings=settings)
    with pytest.raises(DataError, match=r"the task piqa cannot be prepared") as told:
        run_benchmarks(
            find_target("gemma-tiny", default_template="completion"),
            tasks,
            settings=settings,
            run=None,
            reporter=SilentReporter(),
        )
    assert "--task-dir" in str(told.value.hint)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "x", "choices": ["a"], "answer": 0}, r"mine.jsonl, row 1 is not a multiple-choice question"),
        ({"choices": ["a", "b"], "answer": 0}, r"row 1 is not a multiple-choice question"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, r"the answer 2 is not one of its choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": "c"}, r"the answer 'c' is not one of its choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": True}, r"the answer True is not one of its choices"),
    ],
)
def test_wrong_rows(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=told):
        benchmark_tasks._local_tasks(BenchmarkSettings(task_dir=tmp_path))


def test_a_missing_harness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_tasks, "installed_version", lambda _: None)
    with pytest.raises(EngineError, match=r"lm-evaluation-harness, which is not installed") as told:
        require_harness()
    assert told.value.hint == "pip install 'lm-eval[math]==0.4.13'"


def test_a_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    target = find_target(str(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=r"a GGUF is not benchmarked"):
        run_benchmarks(target, [], settings=BenchmarkSettings(), run=None, reporter=SilentReporter())


def test_the_published_averages_follow_from_the_figures() -> None:
    """Table 6 gives the mean of its 18 rows: 45.0, 56.9 and 54.5. A wrong digit of ours would move it."""
    rows = [row.published for name, row in BENCHMARKS.items() if name != "truthfulqa"]
    assert len(rows) == 18
    means = [sum(row[column] or 0.0 for row in rows) / len(rows) for column in range(3)]
    assert means == pytest.approx([45.0, 56.9, 54.5], abs=0.06)
