"""Comparisons with scripted answers and scripted judges."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_tune import load
from gemma_tune.data.rows.template import load_template
from gemma_tune.disk import locked
from gemma_tune.errors import DataError, ModelError
from gemma_tune.evaluation import compare
from gemma_tune.evaluation.compare import compare_models, find_contenders
from gemma_tune.evaluation.comparison import Comparison
from gemma_tune.evaluation.judge import Duel, EndpointJudge, Judge, Ruling
from gemma_tune.evaluation.prompt_sets import Prompt, Prompts
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.target import GgufTarget, Target
from gemma_tune.runs.reporter import SilentReporter
from tests.evaluation.conftest import DrawnRun
from tests.evaluation.fake_judge import serve_judge, shown_answers

NUM_PROMPTS = 40
# How good the answers of each model are; a scripted judge can read it in them.
QUALITY = {"strong": 3, "middle": 2, "weak": 1}
PROMPTS = Prompts("scripted", tuple(Prompt(f"p{n}", f"g{n % 2}", f"question {n}") for n in range(NUM_PROMPTS)))


class Asked:
    """Which models were asked; answers are `LABEL QUALITY NUMBER`."""

    def __init__(self) -> None:
        self.labels: list[str] = []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()

    def answer_questions(target: GgufTarget, questions: Any, *, file: Any, **_: Any) -> None:
        label = target.path.stem
        found.labels.append(label)
        file.write({**row, "answer": f"{label} {QUALITY[label]} {n}"} for n, row in enumerate(questions.rows))

    monkeypatch.setattr(compare, "answer_questions", answer_questions)
    return found


@pytest.fixture
def run(tmp_path: Path, asked: Asked) -> Callable[..., Comparison]:
    def of(*labels: str, judge: Judge | None, prompts: Prompts = PROMPTS, **changes: Any) -> Comparison:
        for label in labels:
            if not (tmp_path / f"{label}.gguf").exists():
                (tmp_path / f"{label}.gguf").write_bytes(b"weights")
        return compare_models(
            {label: GgufTarget(tmp_path / f"{label}.gguf", load_template("chat")) for label in labels},
            prompts,
            settings=AnswerSettings(**changes),
            directory=tmp_path / "out",
            judge=judge,
            reporter=SilentReporter(),
        )

    return of


class ScriptedJudge:
    """Rules by a function, and counts."""

    def __init__(self, verdict: Callable[[Duel], Any], *, both_orders: bool = True, name: str = "scripted") -> None:
        self.verdict, self.asks_both_orders, self.name = verdict, both_orders, name
        self.duels: list[Duel] = []

    def rule(self, duels: Sequence[Duel]) -> Iterator[Ruling | None]:
        for duel in duels:
            self.duels.append(duel)
            verdict = self.verdict(duel)
            if verdict == "stop":
                return
            yield None if verdict is None else Ruling(verdict, "because")


def quality(answer: str) -> int:
    return int(answer.split()[1])


def better(duel: Duel) -> str:
    return "first" if quality(duel.first) > quality(duel.second) else "second"


# --- the order swap ---------------------------------------------------------------------------------------------------


def test_the_swap_cancels_a_judge_that_always_prefers_the_first(run: Callable[..., Comparison]) -> None:
    with serve_judge(lambda _: "The first one reads better.\nVERDICT: A") as endpoint:
        found = run("strong", "weak", judge=EndpointJudge(endpoint.url, "biased"))
    pair = found.pairs[0]
    assert pair.win_rate is not None and abs(pair.win_rate.value - 0.5) <= 0.05
    assert (pair.wins, pair.ties, pair.losses) == (0, NUM_PROMPTS, 0)
    assert len(endpoint.prompts) == 2 * NUM_PROMPTS
    shown = [shown_answers(prompt) for prompt in endpoint.prompts]
    assert sorted(shown) == sorted((second, first) for first, second in shown)
    assert found.judge.first_preferred is not None and found.judge.first_preferred.value == 1.0
    assert found.judge.consistent is not None and found.judge.consistent.value == 0.0


def test_the_swap_cancels_a_noisy_bias(run: Callable[..., Comparison]) -> None:
    """Without the swap this judge would give the model named first 80 %."""
    draw = random.Random(7)

    with serve_judge(lambda _: "VERDICT: A" if draw.random() < 0.8 else "VERDICT: B") as endpoint:
        found = run("strong", "weak", judge=EndpointJudge(endpoint.url, "biased"))
    assert found.pairs[0].win_rate is not None and abs(found.pairs[0].win_rate.value - 0.5) <= 0.1
    assert found.judge.first_preferred is not None and found.judge.first_preferred.value > 0.7


def test_a_fair_judge_is_believed_in_both_orders(run: Callable[..., Comparison]) -> None:
    def reply(prompt: str) -> str:
        first, second = shown_answers(prompt)
        return "VERDICT: A" if quality(first) > quality(second) else "VERDICT: B"

    with serve_judge(reply) as endpoint:
        found = run("weak", "strong", judge=EndpointJudge(endpoint.url, "fair"))
    pair = found.pairs[0]
    assert (pair.first, pair.second, pair.wins, pair.ties, pair.losses) == ("weak", "strong", 0, 0, NUM_PROMPTS)
    assert pair.win_rate is not None and pair.win_rate.value == 0.0 and pair.win_rate.high < 0.1  # type: ignore[operator]
    assert found.judge.first_preferred is not None and found.judge.first_preferred.value == 0.5
    assert found.judge.consistent is not None and found.judge.consistent.value == 1.0


# --- counting ---------------------------------------------------------------------------------------------------------


def test_a_malformed_verdict_is_counted_and_its_pair_left_out(run: Callable[..., Comparison]) -> None:
    """`strong` comes second in the malformed ones; counting the other order alone would be a win."""
    bad = {"question 0", "question 1"}
    judge = ScriptedJudge(
        lambda duel: "malformed" if duel.prompt.text in bad and quality(duel.first) == 1 else better(duel)
    )
    found = run("strong", "weak", judge=judge)
    assert found.judge.malformed == 2
    assert (found.pairs[0].wins, found.pairs[0].ties, found.pairs[0].losses) == (NUM_PROMPTS - 2, 0, 0)
    assert found.questions[0].scores == () and found.questions[2].scores == (("strong", "weak", 1.0),)


def test_groups(run: Callable[..., Comparison]) -> None:
    found = run(
        "strong", "weak", judge=ScriptedJudge(lambda duel: better(duel) if duel.prompt.group == "g0" else "tie")
    )
    by_group = {pair.group: pair for pair in found.pairs}
    assert list(by_group) == [None, "g0", "g1"]
    assert (by_group["g0"].wins, by_group["g1"].ties, by_group[None].wins) == (20, 20, 20)
    assert by_group[None].win_rate is not None and by_group[None].win_rate.value == 0.75


def test_three_models_are_rated(run: Callable[..., Comparison]) -> None:
    found = run("weak", "strong", "middle", judge=ScriptedJudge(better))
    assert [rating.label for rating in found.ratings] == ["strong", "middle", "weak"]
    assert [(pair.first, pair.second) for pair in found.pairs if pair.group is None] == [
        ("weak", "strong"), ("weak", "middle"), ("strong", "middle"),
    ]  # fmt: skip
    assert found.judge.expected == found.judge.duels == 3 * 2 * NUM_PROMPTS


def test_equal_answers_are_a_tie_without_asking(
    run: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_answers", lambda *_, **__: ["the same"] * NUM_PROMPTS)
    judge = ScriptedJudge(better)
    found = run("strong", "weak", judge=judge)
    assert judge.duels == [] and found.pairs[0].ties == NUM_PROMPTS


def test_rules_decide_without_a_judge(run: Callable[..., Comparison]) -> None:
    rules = [{"contains": ["3"]}, {"words": [3, 3]}, {"contains": ["nothing"]}, {}]
    prompts = Prompts("ruled", tuple(Prompt(f"p{n}", "g", f"question {n}", each) for n, each in enumerate(rules)))
    found = run("strong", "weak", judge=None, prompts=prompts)
    (pair,) = found.pairs
    assert (pair.wins, pair.ties, pair.losses) == (1, 2, 0)  # kept by one, by both, by none; the fourth has no rules
    assert {item.label: (item.prompts, item.passed.value) for item in found.passes} == {
        "strong": (3, 2 / 3), "weak": (3, 1 / 3),
    }  # fmt: skip
    assert found.questions[0].broken == ((), ("contains",))
    assert found.questions[3].broken is None and found.questions[3].scores == ()
    assert (found.judge.duels, found.judge.expected) == (3, 4)


def test_rules_need_rules(run: Callable[..., Comparison]) -> None:
    with pytest.raises(DataError, match=r"none of the prompts of scripted has rules"):
        run("strong", "weak", judge=None)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_stopped_person_goes_on(run: Callable[..., Comparison], asked: Asked) -> None:
    """Seven are judged, the second of them skipped; the rest, and the skipped one, come the next time."""
    verdicts = iter(["first", None, "second", "tie", "first", "first", "first", "stop"])
    first = ScriptedJudge(lambda _: next(verdicts), both_orders=False, name="person")
    found = run("strong", "weak", judge=first)
    assert (found.judge.duels, found.judge.expected, found.judge.prompt) == (6, NUM_PROMPTS, None)
    rest = ScriptedJudge(lambda _: "tie", both_orders=False, name="person")
    found = run("strong", "weak", judge=rest)
    assert found.judge.duels == NUM_PROMPTS and len(rest.duels) == NUM_PROMPTS - 6
    assert first.duels[1] in rest.duels and first.duels[0] not in rest.duels
    assert asked.labels == ["strong", "weak"]
    assert sum(pair.ties for pair in found.pairs if pair.group is None) == NUM_PROMPTS - 5


def test_a_person_sees_the_sides_mixed(run: Callable[..., Comparison]) -> None:
    judge = ScriptedJudge(better, both_orders=False, name="person")
    found = run("strong", "weak", judge=judge)
    num_first = sum(quality(duel.first) == 3 for duel in judge.duels)
    assert NUM_PROMPTS * 0.25 < num_first < NUM_PROMPTS * 0.75
    assert found.pairs[0].wins == NUM_PROMPTS  # whatever the side


def test_a_judge_that_fails_keeps_what_it_said(run: Callable[..., Comparison], tmp_path: Path) -> None:
    said = iter(["VERDICT: A"] * 20)
    with serve_judge(lambda _: next(said, (403, {}, ""))) as endpoint:
        judge = EndpointJudge(endpoint.url, "m")
        with pytest.raises(ModelError, match=r"status 403"):
            run("strong", "weak", judge=judge)
        (file,) = (tmp_path / "out").glob("judgments-model-*.jsonl")
        kept = file.read_bytes()
        assert kept.count(b"\n") == 20
        file.write_bytes(kept + b'{"prompt": "p1", "fir')  # a kill while a line was written
        said = iter(["VERDICT: A"] * 2 * NUM_PROMPTS)
        found = run("strong", "weak", judge=judge)
    assert found.judge.duels == 2 * NUM_PROMPTS
    assert file.read_bytes().startswith(kept)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 2 * NUM_PROMPTS


def test_other_judges_have_files_of_their_own(run: Callable[..., Comparison], tmp_path: Path) -> None:
    run("strong", "weak", judge=ScriptedJudge(better, name="one"))
    other = ScriptedJudge(lambda _: "tie", name="two")
    assert run("strong", "weak", judge=other).pairs[0].ties == NUM_PROMPTS
    assert len(list((tmp_path / "out").glob("judgments-*.jsonl"))) == 2


def test_another_comparison_is_refused(run: Callable[..., Comparison], tmp_path: Path) -> None:
    judge = ScriptedJudge(better)
    run("strong", "weak", judge=judge)
    with pytest.raises(DataError, match=r"holds another comparison: it differs in its models"):
        run("strong", "middle", judge=judge)
    with pytest.raises(DataError, match=r"differs in its answers"):
        run("strong", "weak", judge=judge, max_new_tokens=7)
    with pytest.raises(DataError, match=r"differs in its prompts"):
        run("strong", "weak", judge=judge, prompts=PROMPTS.first(3))
    (tmp_path / "weak.gguf").write_bytes(b"other weights")
    with pytest.raises(DataError, match=r"differs in its models"):
        run("strong", "weak", judge=judge)


def test_a_directory_of_something_else_is_left_alone(run: Callable[..., Comparison], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds other files"):
        run("strong", "weak", judge=None)
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "out" / "comparison.json")
    with pytest.raises(DataError, match=r"comparison\.json is damaged"):
        run("strong", "weak", judge=None)


def test_a_killed_start_and_another_process(run: Callable[..., Comparison], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".comparison.json.77.tmp").write_text("{", encoding="utf-8")
    with locked(tmp_path / "out"), pytest.raises(DataError, match=r"another process compares in"):
        run("strong", "weak", judge=ScriptedJudge(better))
    run("strong", "weak", judge=ScriptedJudge(better))


# --- real models ------------------------------------------------------------------------------------------------------


def test_a_run_against_its_base(drawn_run: DrawnRun, tmp_path: Path) -> None:
    run = str(drawn_run.run.path)
    contenders = find_contenders([run, f"{run}@base"])
    tuned, base = contenders.values()
    assert isinstance(tuned, Target) and isinstance(base, Target)
    assert tuned.adapter == drawn_run.run.adapter and base.adapter is None
    prompts = Prompts(
        "rows", tuple(Prompt(f"p{n}", "g", row["instruction"]) for n, row in enumerate(drawn_run.rows[:4]))
    )
    judge = ScriptedJudge(lambda _: "first")
    found = compare_models(
        contenders,
        prompts,
        settings=AnswerSettings(max_new_tokens=8),
        directory=tmp_path / "out",
        judge=judge,
        reporter=SilentReporter(),
    )
    for column, without_adapter in ((0, False), (1, True)):
        model = load(run, without_adapter=without_adapter)
        wanted = model.generate([prompt.text for prompt in prompts.items], max_new_tokens=8)
        assert [question.answers[column] for question in found.questions] == wanted


@pytest.mark.parametrize(
    ("names", "told"),
    [(["a"], r"nothing to compare with"), (["a", "b", "a"], r"a is named twice"), (["gemma-tiny", "x"], r"template")],
)
def test_wrong_names(names: list[str], told: str) -> None:
    with pytest.raises((DataError, ModelError), match=told):
        find_contenders(names)
