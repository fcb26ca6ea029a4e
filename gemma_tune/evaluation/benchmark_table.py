"""The benchmarks of the Gemma report by name: the harness's task, the shots, the measure, and the published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PUBLISHED_MODELS = ("Gemma 2B", "Gemma 7B", "Mistral 7B")
PUBLISHED_SOURCE = (
    "Gemma: Open Models Based on Gemini Research and Technology, arXiv:2403.08295v4, table 6; TruthfulQA from table 7"
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    label: str
    task: str  # the harness's name
    # examples in front of each question as the report states them; None: it does not, and the task's own number is
    # taken
    shots: int | None
    metric: str  # the harness's metric that is shown, with its filter
    # percent, in the order of PUBLISHED_MODELS; None where the report has no figure
    published: tuple[float | None, float | None, float | None]
    runs_code: bool = False  # whether it executes programs that the model writes


# Mistral's SIQA, BoolQ, CQA, MBPP, GSM8K, AGIEval and BBH were measured by the report's authors. The report shows its
# GSM8K as maj@1 and its WinoGrande with partial scoring, which is how the harness scores it. It does not say which
# accuracies are divided by the length of a choice: acc_norm is taken where that is customary.
BENCHMARKS: Mapping[str, Benchmark] = {
    "mmlu": Benchmark("MMLU", "mmlu", 5, "acc", (42.3, 64.3, 62.5)),
    "hellaswag": Benchmark("HellaSwag", "hellaswag", 0, "acc_norm", (71.4, 81.2, 81.0)),
    "piqa": Benchmark("PIQA", "piqa", 0, "acc_norm", (77.3, 81.2, 82.2)),
    "siqa": Benchmark("SIQA", "social_iqa", 0, "acc", (49.7, 51.8, 47.0)),
    "boolq": Benchmark("BoolQ", "boolq", 0, "acc", (69.4, 83.2, 83.2)),
    "winogrande": Benchmark("WinoGrande", "winogrande", None, "acc", (65.4, 72.3, 74.2)),
    "commonsenseqa": Benchmark("CommonsenseQA", "commonsense_qa", 7, "acc", (65.3, 71.3, 66.3)),
    "openbookqa": Benchmark("OpenBookQA", "openbookqa", None, "acc_norm", (47.8, 52.8, 52.2)),
    "arc-e": Benchmark("ARC-e", "arc_easy", None, "acc", (73.2, 81.5, 80.5)),
    "arc-c": Benchmark("ARC-c", "arc_challenge", None, "acc_norm", (42.1, 53.2, 54.9)),
    "triviaqa": Benchmark("TriviaQA", "triviaqa", 5, "exact_match,remove_whitespace", (53.2, 63.4, 62.5)),
    "nq": Benchmark("NQ", "nq_open", 5, "exact_match,remove_whitespace", (12.5, 23.0, 23.2)),
    "humaneval": Benchmark("HumanEval", "humaneval", None, "pass@1,create_test", (22.0, 32.3, 26.2), runs_code=True),
    "mbpp": Benchmark("MBPP", "mbpp", 3, "pass_at_1", (29.2, 44.4, 40.2), runs_code=True),
    "gsm8k": Benchmark("GSM8K", "gsm8k", None, "exact_match,flexible-extract", (17.7, 46.4, 35.4)),
    "math": Benchmark("MATH", "minerva_math", 4, "exact_match", (11.8, 24.3, 12.7)),
    "agieval": Benchmark("AGIEval", "agieval_en", None, "acc", (24.2, 41.7, 41.2)),
    "bbh": Benchmark("BBH", "bbh_cot_fewshot", None, "exact_match,get-answer", (35.2, 55.1, 56.1)),
    "truthfulqa": Benchmark("TruthfulQA", "truthfulqa_mc2", None, "acc", (None, 44.8, 42.2)),
}
# A name for all of them.
PAPER_SET = "gemma-paper"
