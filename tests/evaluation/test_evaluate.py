"""An evaluation against figures that are made anew: plain transformers, weights merged by hand, scipy's bootstrap."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.data.metrics import squad_metrics

from gemma_tune.errors import DataError, ModelError
from gemma_tune.evaluation.evaluate import EvaluateSettings, evaluate_run, parse_sides
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.runs.evaluation import Evaluation, Figure, read_evaluation
from gemma_tune.runs.reporter import SilentReporter
from tests.evaluation.conftest import MAX_NEW_TOKENS, NUM_ROWS, DrawnRun
from tools.tiny.documents import iter_documents
from tools.tiny.world import build_world


@pytest.fixture(scope="module")
def evaluation(drawn_run: DrawnRun) -> Evaluation:
    found, is_new = evaluate_run(drawn_run.run, settings=EvaluateSettings(), reporter=SilentReporter())
    assert is_new
    return found


class ByHand:
    """One model: weights multiplied out here, rows one by one, tokens chosen one by one without a cache."""

    def __init__(self, adapter: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)
        self.model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32).eval()
        if adapter is not None:
            settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            tensors = load_file(adapter / "adapter_model.safetensors")
            weights = dict(self.model.named_parameters())
            for name in [name for name in tensors if "lora_A" in name]:
                update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
                target = name.removeprefix("base_model.model.").replace("lora_A.", "")
                weights[target].data += update * settings["lora_alpha"] / settings["r"]

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0]

    def loss(self, prompt: str, text: str, *, stop: bool) -> tuple[float, int]:
        """Nats of `text` and its number of tokens; prompt and text are tokenized apart, as they are in training."""
        start = [self.tokenizer.bos_token_id, *self.ids(prompt)]
        end = self.ids(text) + [self.tokenizer.eos_token_id] * stop
        log_probs = torch.log_softmax(self.logits(start + end), dim=-1)
        nats = -sum(float(log_probs[len(start) + at - 1, token]) for at, token in enumerate(end))
        return nats, len(end)

    def answer(self, prompt: str) -> tuple[str, bool]:
        ids = [self.tokenizer.bos_token_id, *self.ids(prompt)]
        start = len(ids)
        stops = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<end_of_turn>")}
        while len(ids) - start < MAX_NEW_TOKENS:
            token = int(self.logits(ids)[-1].argmax())
            if token in stops:
                return self.tokenizer.decode(ids[start:]).strip(), True
            ids.append(token)
        return self.tokenizer.decode(ids[start:]).strip(), False

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def dolly_prompt(row: dict[str, str]) -> str:
    context = f"### Context:\n{row['context']}\n\n" if row["context"].strip() else ""
    return f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"


@pytest.fixture(scope="module")
def by_hand(drawn_run: DrawnRun) -> dict[str, list[dict[str, Any]]]:
    """What each model did with each row."""
    found: dict[str, list[dict[str, Any]]] = {}
    for side, adapter in (("base", None), ("tuned", drawn_run.run.adapter)):
        model = ByHand(adapter)
        found[side] = []
        for row in drawn_run.rows:
            nats, tokens = model.loss(dolly_prompt(row), row["response"], stop=True)
            answer, stopped = model.answer(dolly_prompt(row))
            found[side].append({"nats": nats, "tokens": tokens, "answer": answer, "stopped": stopped, **row})
    return found


def estimates(figure: Figure) -> dict[str, Any]:
    return {"base": figure.base, "tuned": figure.tuned}


def test_answers_and_losses_are_those_made_by_hand(
    evaluation: Evaluation, drawn_run: DrawnRun, by_hand: dict[str, list[dict[str, Any]]]
) -> None:
    lines = drawn_run.run.evaluated_rows.read_text(encoding="utf-8").splitlines()
    assert len(lines) == NUM_ROWS
    # A run orders its held-out rows by a hash.
    rows = {(row["question"], row["expected"]): row for row in map(json.loads, lines)}
    for side, expected in by_hand.items():
        for hand in expected:
            found = rows[hand["instruction"], hand["response"]][side]
            assert (found["text"], found["stopped"]) == (hand["answer"], hand["stopped"])
            assert found["loss_tokens"] == hand["tokens"]
            assert found["loss_nats"] == pytest.approx(hand["nats"], rel=1e-4)
    assert len({row["answer"] for row in by_hand["tuned"]} - {row["answer"] for row in by_hand["base"]}) > 3


MEASURES: dict[str, Callable[[dict[str, Any]], tuple[float, float]]] = {
    "loss": lambda row: (row["nats"], row["tokens"]),
    "exact_match": lambda row: (" ".join(row["answer"].split()) == row["response"], 1),
    "token_f1": lambda row: (squad_metrics.compute_f1(row["response"], row["answer"]), 1),
    "stopped": lambda row: (row["stopped"], 1),
    "length": lambda row: (len(row["answer"].split()), len(row["response"].split())),
}


@pytest.mark.parametrize("metric", MEASURES)
def test_figures_and_intervals_are_those_made_by_hand(
    metric: str, evaluation: Evaluation, by_hand: dict[str, list[dict[str, Any]]]
) -> None:
    parts = {side: np.array([MEASURES[metric](row) for row in rows], dtype=float).T for side, rows in by_hand.items()}
    figure = evaluation.rows[0].figure(metric)
    assert figure is not None and figure.difference is not None
    values = {side: numerators.sum() / denominators.sum() for side, (numerators, denominators) in parts.items()}
    for side, estimate in estimates(figure).items():
        assert estimate.value == pytest.approx(values[side], rel=1e-4)
        assert estimate.low <= estimate.value <= estimate.high
    assert figure.difference.value == pytest.approx(values["tuned"] - values["base"], rel=1e-3, abs=1e-6)

    def difference(base: Any, base_of: Any, tuned: Any, tuned_of: Any, axis: int = -1) -> Any:
        return tuned.sum(axis) / tuned_of.sum(axis) - base.sum(axis) / base_of.sum(axis)

    bootstrap = stats.bootstrap(
        (*parts["base"], *parts["tuned"]), difference, paired=True, method="percentile", n_resamples=20_000,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    tolerance = bootstrap.standard_error / 4 + 1e-9
    assert figure.difference.low == pytest.approx(bootstrap.confidence_interval.low, abs=tolerance)
    assert figure.difference.high == pytest.approx(bootstrap.confidence_interval.high, abs=tolerance)


def test_perplexity_is_exp_of_the_loss(evaluation: Evaluation) -> None:
    for group in (*evaluation.rows, *evaluation.general):
        loss, perplexity = group.figure("loss"), group.figure("perplexity")
        assert loss is not None and perplexity is not None
        for side, estimate in estimates(loss).items():
            other = estimates(perplexity)[side]
            assert other.value == pytest.approx(np.exp(estimate.value))
            if estimate.low is not None:
                assert (other.low, other.high) == pytest.approx((np.exp(estimate.low), np.exp(estimate.high)))


def test_categories_are_the_rows_of_each(
    evaluation: Evaluation, drawn_run: DrawnRun, by_hand: dict[str, list[dict[str, Any]]]
) -> None:
    groups = {group.category: group for group in evaluation.rows[1:]}
    assert sum(group.rows for group in groups.values()) == NUM_ROWS
    assert set(groups) == {row["category"] for row in drawn_run.rows}
    for category, group in groups.items():
        rows = [row for row in by_hand["tuned"] if row["category"] == category]
        figure = group.figure("loss")
        assert figure is not None and figure.tuned is not None
        mean = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
        assert figure.tuned.value == pytest.approx(mean, rel=1e-4)


def test_the_forgetting_check_scores_whole_texts(evaluation: Evaluation, drawn_run: DrawnRun) -> None:
    documents = iter_documents(build_world(), seed=20_260)
    texts = [next(documents) for _ in range(28)]
    for side, adapter in (("base", None), ("tuned", drawn_run.run.adapter)):
        model = ByHand(adapter)
        nats, tokens = np.sum([model.loss("", text, stop=False) for text in texts], axis=0)
        figure = evaluation.general[0].figure("loss")
        assert figure is not None
        assert estimates(figure)[side].value == pytest.approx(nats / tokens, rel=1e-4)
    assert figure.verdict == "worse"


def test_nothing_is_measured_twice(
    evaluation: Evaluation, drawn_run: DrawnRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("gemma_tune.inference.load_target.load_target", refuse)
    found, is_new = evaluate_run(drawn_run.run, settings=EvaluateSettings(), reporter=SilentReporter())
    assert not is_new
    assert found == evaluation == read_evaluation(drawn_run.run)
    # The batch size decides nothing; every other setting does.
    _, is_new = evaluate_run(drawn_run.run, settings=EvaluateSettings(batch_size=1), reporter=SilentReporter())
    assert not is_new
    for settings in (
        EvaluateSettings(num_rows=3),
        EvaluateSettings(sides=("tuned",)),
        EvaluateSettings(max_new_tokens=3),
        EvaluateSettings(expects_json=True),
        EvaluateSettings(source=str(drawn_run.rows_file)),
    ):
        with pytest.raises(AssertionError, match="a model is loaded"):
            evaluate_run(drawn_run.run, settings=settings, reporter=SilentReporter())
    with pytest.raises(AssertionError, match="a model is loaded"):
        evaluate_run(drawn_run.run, settings=EvaluateSettings(), reporter=SilentReporter(), again=True)


def test_rows_of_a_file_one_model_and_json(drawn_run: DrawnRun, tmp_path: Any, evaluation: Evaluation) -> None:
    before = drawn_run.run.evaluated_rows.read_bytes(), read_evaluation(drawn_run.run)
    settings = EvaluateSettings(
        sides=("base",), source=str(drawn_run.rows_file), num_rows=1, expects_json=True, max_new_tokens=4
    )
    found, is_new = evaluate_run(drawn_run.run, settings=settings, reporter=SilentReporter())
    assert is_new
    (group,) = found.rows  # a single category is no table of its own
    assert (group.rows, found.rows_label) == (1, "held-out.jsonl")
    figure = group.figure("valid_json")
    assert figure is not None and figure.base is not None
    assert (figure.base.value, figure.base.low, figure.tuned, figure.difference) == (0.0, None, None, None)
    (row,) = map(json.loads, drawn_run.run.evaluated_rows.read_text(encoding="utf-8").splitlines())
    assert row["expected"] == drawn_run.rows[0]["response"]
    assert "tuned" not in row and row["base"]["num_tokens"] <= 4
    drawn_run.run.evaluated_rows.write_bytes(before[0])


def test_rows_that_cannot_be_used_are_named(drawn_run: DrawnRun, tmp_path: Any) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"mine.jsonl: 1 of 2 rows cannot be used[^\n]*\n  mine.jsonl:2: response is"):
        evaluate_run(drawn_run.run, settings=EvaluateSettings(source=str(file)), reporter=SilentReporter())


def test_changed_rows_are_refused(drawn_run: DrawnRun) -> None:
    text = drawn_run.rows_file.read_text(encoding="utf-8")
    drawn_run.rows_file.write_text(text.splitlines()[0] + "\n", encoding="utf-8")
    try:
        with pytest.raises(DataError, match=r"rows of this run have changed since it was trained"):
            evaluate_run(drawn_run.run, settings=EvaluateSettings(), reporter=SilentReporter())
    finally:
        drawn_run.rows_file.write_text(text, encoding="utf-8")


def test_another_base_is_refused(drawn_run: DrawnRun) -> None:
    lock = json.loads(drawn_run.run.lock.read_text(encoding="utf-8"))
    changed = lock | {"base": lock["base"] | {"files": lock["base"]["files"] | {"model.safetensors": "0" * 64}}}
    drawn_run.run.lock.write_text(json.dumps(changed), encoding="utf-8")
    try:
        with pytest.raises(ModelError, match=r"is not the base that .*: these files differ: model.safetensors"):
            evaluate_run(drawn_run.run, settings=EvaluateSettings(), reporter=SilentReporter())
    finally:
        drawn_run.run.lock.write_text(json.dumps(lock), encoding="utf-8")


def test_sides_are_named() -> None:
    assert parse_sides("tuned, base") == ("base", "tuned")
    assert parse_sides("tuned") == ("tuned",)
    with pytest.raises(DataError, match=r"cannot evaluate 'tune'; did you mean 'tuned'\?"):
        parse_sides("tune")
    with pytest.raises(DataError, match="nothing to evaluate"):
        parse_sides(",")
