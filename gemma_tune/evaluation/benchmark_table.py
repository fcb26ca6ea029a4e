"""The benchmarks of the Gemma report by name: the harness's task, the shots, the measure, and the published figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.paths import read_table

PUBLISHED_MODELS = ("Gemma 2B", "Gemma 7B", "Mistral 7B")
PUBLISHED_SOURCE = (
    "Gemma: Open Models Based on Gemini Research and Technology, arXiv:2403.08295v4, table 6; TruthfulQA from table 7"
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    label: str
    task: str  # the harness's name
    metric: str  # the harness's metric that is shown, with its filter
    # percent, in the order of PUBLISHED_MODELS; None where the report has no figure
    published: tuple[float | None, ...]
    # examples in front of each question as the report states them; None: it does not, and the task's own number is
    # taken
    shots: int | None = None
    runs_code: bool = False  # whether it executes programs that the model writes


def _read_row(row: dict[str, Any]) -> Benchmark:
    return Benchmark(**{**row, "published": tuple(map(row["published"].get, PUBLISHED_MODELS))})


BENCHMARKS: Mapping[str, Benchmark] = {
    name: _read_row(row) for name, row in read_table("evaluation/benchmark_table.toml").items()
}
# A name for all of them.
PAPER_SET = "gemma-paper"
