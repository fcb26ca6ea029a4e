"""`gemma-tune benchmark`: what it asks for and what it prints. The figures have tests of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli.benchmark import benchmark
from gemma_tune.errors import DataError
from gemma_tune.evaluation import benchmark_tasks, benchmarks
from gemma_tune.evaluation.benchmark_tasks import BenchmarkSettings
from gemma_tune.evaluation.benchmarks import BenchmarkResult
from gemma_tune.evaluation.intervals import share_estimate

KEY = {"shots": 5, "limit": 10}


def result(name: str, side: Any, share: float) -> BenchmarkResult:
    return BenchmarkResult(
        name, name.upper(), side, 5, "acc", share_estimate(share, num_rows=10), {"acc": share}, 10, "now", KEY
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asked for; it is answered at once."""
    found: dict[str, Any] = {}

    def choose_tasks(names: list[str], *, settings: BenchmarkSettings) -> tuple[list[Any], list[str]]:
        found.update(names=names, settings=settings)
        return [], ["humaneval"] if "gemma-paper" in names else []

    def run_benchmarks(target: Any, tasks: Any, **arguments: Any) -> list[BenchmarkResult]:
        found.update(arguments, target=target)
        return [result(name, side, 0.5) for name in ("mmlu", "mine") for side in ("base", "tuned")]

    monkeypatch.setattr(benchmark_tasks, "require_harness", lambda: None)
    monkeypatch.setattr(benchmark_tasks, "choose_tasks", choose_tasks)
    monkeypatch.setattr(benchmarks, "run_benchmarks", run_benchmarks)
    return found


def test_every_option_arrives(asked: dict[str, Any], tmp_path: Path) -> None:
    benchmark(
        "gemma-tiny", tasks="mmlu, mine", limit=3, shots=2, batch_size=4, task_dir=tmp_path, allow_code=True, again=True
    )
    assert asked["names"] == ["mmlu", "mine"]
    assert asked["settings"] == BenchmarkSettings(2, 3, 4, tmp_path, True)
    assert asked["again"] is True and asked["run"] is None


def test_the_table(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("gemma-tiny")
    assert asked["names"] == ["gemma-paper"]
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert "questions shots measure base tuned Gemma 2B Gemma 7B Mistral 7B" in lines
    assert "MMLU 10 5 acc 50.0 [23.7, 76.3] 50.0 [23.7, 76.3] 42.3 64.3 62.5" in lines
    assert "MINE 10 5 acc 50.0 [23.7, 76.3] 50.0 [23.7, 76.3] — — —" in lines
    assert "arXiv:2403.08295" in printed.out
    assert "left out, as they execute code: humaneval" in printed.err


def test_json(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("gemma-tiny", as_json=True)
    first, *_, last = json.loads(capsys.readouterr().out)
    assert first["published"]["Mistral 7B"] == 62.5 and "2403.08295" in first["published"]["source"]
    assert last["published"] is None and last["value"]["value"] == 0.5


def test_nothing_to_measure(asked: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"nothing to measure"):
        benchmark("gemma-tiny", tasks=" , ")
