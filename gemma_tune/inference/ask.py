"""Many questions answered window by window, in order, so that an interrupted file of answers can be continued."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.data.rows.render import render_prompt
from gemma_tune.data.rows.segments import RowError
from gemma_tune.inference.answer_file import AnswerFile
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.questions import Questions
from gemma_tune.inference.streaming import OnProgress, OnText
from gemma_tune.inference.target import GgufTarget, Target

if TYPE_CHECKING:
    from gemma_tune.inference.generate import Completion
    from gemma_tune.inference.load_target import LoadedTarget


@dataclass
class Speed:
    """Tokens and seconds of generating, loading apart; grows while answers are made."""

    num_answers: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def add(self, completions: Sequence[Completion], *, seconds: float) -> None:
        self.num_answers += len(completions)
        self.num_tokens += sum(completion.num_tokens for completion in completions)
        self.seconds += seconds

    def __str__(self) -> str:
        answers = f"{self.num_answers:,} answers, " if self.num_answers > 1 else ""
        per_second = self.num_tokens / self.seconds if self.seconds else 0.0
        return f"{answers}{self.num_tokens:,} tokens in {self.seconds:.1f} s ({per_second:,.0f} tokens/s)"


@dataclass(frozen=True)
class Answered:
    """A row that was asked, with its answer."""

    row: dict[str, Any]
    completion: Completion

    def to_json(self) -> dict[str, Any]:
        """The row with `answer`, `num_tokens` and `stopped`; what it has under these names becomes `given_answer`…"""
        completion = self.completion
        answer = {"answer": completion.text, "num_tokens": completion.num_tokens, "stopped": completion.stopped}
        return {f"given_{name}" if name in answer else name: value for name, value in self.row.items()} | answer


def encode_questions(loaded: LoadedTarget, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The token ids that ask for an answer to each row, BOS first.

    Raises:
        RowError: a row lacks what the data template reads; the message numbers it.
    """
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            segments = render_prompt(loaded.template, row, chat=loaded.chat)
        except RowError as error:
            raise RowError(f"question {number}" if len(rows) > 1 else error.where, error.problem) from None
        prompts.append(loaded.encoder.encode_prompt(segments))
    return prompts


@dataclass(frozen=True)
class Listener:
    """What is called while questions are answered."""

    on_answers: Callable[[list[Answered]], None] = lambda _: None  # with every finished window
    on_progress: OnProgress = lambda done, total: None  # with the number of finished questions and of all
    on_text: OnText | None = None  # with the pieces of a single answer; with beams there are none


def answer_questions(
    target: Target | GgufTarget,
    questions: Questions,
    *,
    settings: AnswerSettings,
    file: AnswerFile | None = None,
    listener: Listener | None = None,
) -> Speed:
    """Load a target and answer every question, a window at a time.

    Every window draws from a seed of its own, so that what is made after a kill is what would have been made.

    Args:
        file: takes the answers and says how many it has already.

    Raises:
        GemmaTuneError: the target cannot be loaded, or a question cannot be asked; nothing was answered then.
    """
    from gemma_tune.inference.load_target import load_target

    listener = listener or Listener()
    loaded = load_target(target)
    prompts = encode_questions(loaded, questions.rows)
    speed = Speed()
    for first in range(file.num_found if file else 0, len(prompts), settings.window):
        window = slice(first, first + settings.window)
        started = time.perf_counter()
        completions = loaded.complete(
            prompts[window],
            _seeded_apart(settings, first),
            on_progress=functools.partial(_report_progress, listener, before=first, total=len(prompts)),
            on_text=listener.on_text,
        )
        speed.add(completions, seconds=time.perf_counter() - started)
        answers = [Answered(row, each) for row, each in zip(questions.rows[window], completions, strict=True)]
        if file is not None:
            file.write(answer.to_json() for answer in answers)
        listener.on_answers(answers)
    return speed


def _report_progress(listener: Listener, done: int, _: int, *, before: int, total: int) -> None:
    listener.on_progress(before + done, total)


def _seeded_apart(settings: AnswerSettings, first: int) -> AnswerSettings:
    """The settings of the window that begins with question `first`, from 0."""
    seed = settings.sampling.seed
    if seed is None:
        return settings
    return replace(settings, sampling=replace(settings.sampling, seed=seed + first))


def open_answer_file(
    path: Path, target: Target | GgufTarget, questions: Questions, *, settings: AnswerSettings
) -> AnswerFile:
    """The file for answers, which is continued only with what decided the answers in it.

    Raises:
        DataError: as `AnswerFile`.
    """
    deciding = {**target.identity(), "questions": questions.sha256, **settings.to_json()}
    return AnswerFile(path, settings=deciding, window=settings.window)
