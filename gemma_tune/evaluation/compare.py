"""Several models on the same prompts: their answers, who wins, and by whose judgement.

A comparison is a directory: `comparison.json` (what decides the answers), `answers-N.jsonl` of each model, and a
`judgments-….jsonl` of each judge. What is there already is not made again.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gemma_tune.disk import is_next_content, locked, read_json_object, reason_of, write_json
from gemma_tune.errors import DataError
from gemma_tune.evaluation.answer_rules import broken_rules
from gemma_tune.evaluation.comparison import ComparedPrompt, Comparison, JudgeFacts, PairResult, PassRate, Scores
from gemma_tune.evaluation.duels import judge_answers, read_lines
from gemma_tune.evaluation.intervals import share_estimate
from gemma_tune.evaluation.judge import Judge
from gemma_tune.evaluation.prompt_sets import Prompts
from gemma_tune.evaluation.ratings import rate, win_rate
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.ask import Listener, answer_questions, open_answer_file
from gemma_tune.inference.questions import questions_of
from gemma_tune.inference.target import GgufTarget, Target, find_target
from gemma_tune.runs.reporter import Reporter

_BASE_SUFFIX = "@base"


# The models by what the user called them.
Contenders = Mapping[str, Target | GgufTarget]


def find_contenders(names: Sequence[str], *, default_template: str | None = None) -> Contenders:
    """Resolve what the user named; `RUN@base` is the base of a run, asked with the run's own template.

    Raises:
        GemmaTuneError: fewer than two, the same one twice, or one that cannot be asked.
    """
    if len(names) < 2:
        raise DataError("there is nothing to compare with", hint=f"name two or more, such as RUN and RUN{_BASE_SUFFIX}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{twice[0]} is named twice", hint="name each model once")
    found = {}
    for name in names:
        is_base = name.endswith(_BASE_SUFFIX) and not Path(name).exists()
        path = name.removesuffix(_BASE_SUFFIX) if is_base else name
        found[name] = find_target(path, default_template=default_template, without_adapter=is_base)
    return found


def compare_models(
    contenders: Contenders,
    prompts: Prompts,
    *,
    settings: AnswerSettings,
    directory: Path,
    judge: Judge | None,
    reporter: Reporter,
) -> Comparison:
    """Answer every prompt with every model and judge the answers, keeping what `directory` holds already.

    Args:
        judge: rules on pairs of answers; None lets the prompts' own rules decide.

    Raises:
        GemmaTuneError: a model or the judge cannot be asked, or `directory` holds another comparison.
    """
    with _held_directory(directory, contenders, prompts, settings=settings):
        answers = {}
        for number, (label, target) in enumerate(contenders.items(), start=1):
            reporter.stage(f"answers of {label}")
            file = directory / f"answers-{number}.jsonl"
            answers[label] = _answers(target, prompts, file=file, settings=settings, reporter=reporter)
        labels = tuple(answers)
        broken = _broken_rules(prompts, answers)
        if judge is None:
            scores, facts = _scores_of_rules(prompts, labels, broken)
        else:
            reporter.stage(f"judge: {judge.name}")
            scores, facts = judge_answers(prompts, answers, judge=judge, directory=directory, reporter=reporter)
    return Comparison(
        labels=labels,
        prompts_label=prompts.label,
        judge=facts,
        pairs=tuple(_pair_results(prompts, scores)),
        ratings=rate(labels, scores) if len(labels) > 2 and any(scores.values()) else (),
        passes=tuple(_pass_rates(prompts, labels, broken)),
        questions=tuple(_questions(prompts, answers, broken, scores)),
    )


@contextmanager
def _held_directory(
    directory: Path, contenders: Contenders, prompts: Prompts, *, settings: AnswerSettings
) -> Iterator[None]:
    """Make the directory, or check that it holds this comparison; no other process may compare in it meanwhile."""
    deciding = {
        "models": {label: target.identity() for label, target in contenders.items()},
        "prompts": {"label": prompts.label, "count": len(prompts.items), "sha256": prompts.sha256},
        "answers": settings.to_json(),
    }
    # As it would be read back: tuples become lists.
    deciding = json.loads(json.dumps(deciding))
    file = directory / "comparison.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {directory}: {reason_of(error)}") from None
    with locked(directory) as is_ours:
        if not is_ours:
            raise DataError(f"another process compares in {directory}", hint="wait for it, or give another --output")
        if file.is_file():
            found = read_json_object(file, error=DataError)
            changed = [name for name, value in deciding.items() if found.get(name) != value]
            if changed:
                raise DataError(
                    f"{directory} holds another comparison: it differs in its {', '.join(changed)}",
                    hint="give a directory of its own with --output, or remove that one",
                )
        elif not all(is_next_content(path.name, {file.name}) for path in directory.iterdir()):
            raise DataError(f"{directory} holds other files", hint="give a new or empty directory with --output")
        else:
            write_json(file, deciding)
        yield


def _answers(
    target: Target | GgufTarget, prompts: Prompts, *, file: Path, settings: AnswerSettings, reporter: Reporter
) -> list[str]:
    if not file.is_file():
        questions = questions_of(target.template, [prompt.text for prompt in prompts.items])
        with open_answer_file(file, target, questions, settings=settings) as answers:
            answer_questions(
                target,
                questions,
                settings=settings,
                file=answers,
                listener=Listener(on_progress=lambda done, total: reporter.progress("prompts answered", done, total)),
            )
    found = [row["answer"] for row in read_lines(file)]
    if len(found) != len(prompts.items):
        raise DataError(f"{file} is damaged: it holds {len(found)} of {len(prompts.items)} answers", hint="remove it")
    return found


# --- rules ------------------------------------------------------------------------------------------------------------


def _broken_rules(prompts: Prompts, answers: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[str]]]:
    """By prompt and label, for the prompts that have rules."""
    return {
        prompt.id: {
            label: broken_rules(prompt.rules, prompt=prompt.text, answer=of[index]) for label, of in answers.items()
        }
        for index, prompt in enumerate(prompts.items)
        if prompt.rules
    }


def _scores_of_rules(
    prompts: Prompts, labels: Sequence[str], broken: Mapping[str, Mapping[str, Sequence[str]]]
) -> tuple[Scores, JudgeFacts]:
    """Who keeps the rules beats who breaks them; nothing is said where a prompt has none."""
    if not broken:
        raise DataError(
            f"none of the prompts of {prompts.label} has rules",
            hint="name a judge with --judge: person, a model or URL",
        )
    scores = {
        (first, second): {
            prompt: (1 + (not of[first]) - (not of[second])) / 2  # 1, 1/2 or 0
            for prompt, of in broken.items()
        }
        for first, second in itertools.combinations(labels, 2)
    }
    duels = len(scores) * len(prompts.items)
    return scores, JudgeFacts("rules", None, len(scores) * len(broken), duels, 0, None, None)


def _pass_rates(
    prompts: Prompts, labels: Sequence[str], broken: Mapping[str, Mapping[str, Sequence[str]]]
) -> Iterator[PassRate]:
    for group, ids in _groups(prompts).items():
        ruled = [id for id in ids if id in broken]
        for label in labels if ruled else ():
            passed = sum(not broken[id][label] for id in ruled)
            yield PassRate(label, group, len(ruled), share_estimate(passed / len(ruled), num_rows=len(ruled)))


# --- results ----------------------------------------------------------------------------------------------------------


def _groups(prompts: Prompts) -> dict[str | None, list[str]]:
    """Prompt ids: all of them under None, then of each group where there are several."""
    groups: dict[str | None, list[str]] = {None: [prompt.id for prompt in prompts.items]}
    for prompt in prompts.items:
        groups.setdefault(prompt.group, []).append(prompt.id)
    return groups if len(groups) > 2 else {None: groups[None]}


def _pair_results(prompts: Prompts, scores: Scores) -> Iterator[PairResult]:
    for group, ids in _groups(prompts).items():
        for (first, second), of_pair in scores.items():
            values = [of_pair[id] for id in ids if id in of_pair]
            yield PairResult(
                first=first,
                second=second,
                group=group,
                wins=sum(value > 0.5 for value in values),
                ties=sum(value == 0.5 for value in values),
                losses=sum(value < 0.5 for value in values),
                win_rate=win_rate(values) if values else None,
            )


def _questions(
    prompts: Prompts,
    answers: Mapping[str, Sequence[str]],
    broken: Mapping[str, Mapping[str, Sequence[str]]],
    scores: Scores,
) -> Iterator[ComparedPrompt]:
    for index, prompt in enumerate(prompts.items):
        of_rules = broken.get(prompt.id)
        yield ComparedPrompt(
            id=prompt.id,
            group=prompt.group,
            prompt=prompt.text,
            reference=prompt.reference,
            answers=tuple(of[index] for of in answers.values()),
            broken=None if of_rules is None else tuple(tuple(of_rules[label]) for label in answers),
            scores=tuple((*pair, of_pair[prompt.id]) for pair, of_pair in scores.items() if prompt.id in of_pair),
        )
