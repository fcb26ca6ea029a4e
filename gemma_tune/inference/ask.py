"""Many questions answered window by window, in order, so that a file of answers can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.data.rows.render import render_prompt
from gemma_tune.data.rows.segments import RowError
from gemma_tune.errors import DataError
from gemma_tune.inference.answer_file import AnswerFile
from gemma_tune.inference.questions import Questions
from gemma_tune.inference.sampling import Sampling
from gemma_tune.inference.streaming import OnText
from gemma_tune.inference.target import GgufTarget, Target
from gemma_tune.models.safetensors import file_stamp

if TYPE_CHECKING:
    from gemma_tune.inference.generate import Completion
    from gemma_tune.inference.load import LoadedTarget

# Prompts of one window are sorted by length before they are batched, so it is worth several batches; and what a kill
# can cost is one window.
_BATCHES_PER_WINDOW = 4
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made.

    Attributes:
        max_new_tokens: longest answer; None: what `max_length` leaves, and 256 without one.
        max_length: longest prompt and answer together, in tokens; None: the model's context.
        stop_strings: texts that end an answer and are left out of it.
        batch_size: prompts per forward pass.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop_strings: tuple[str, ...] = ()
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}", hint="allowed: 1 or more")
        if not all(self.stop_strings):
            raise DataError("a stop string is empty", hint="leave it out: an empty text occurs everywhere")

    @property
    def window(self) -> int:
        """Questions that are answered before the next ones are looked at."""
        return self.batch_size * _BATCHES_PER_WINDOW

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LoadedTarget.complete`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"max_new_tokens": self.max_new_tokens or self.max_length or _MAX_NEW_TOKENS}

    def to_json(self) -> dict[str, Any]:
        """What decides an answer, for a file of answers to compare."""
        values = {**self.arguments(), "stop_strings": list(self.stop_strings)}
        return {**values, "sampling": asdict(replace(self.sampling, custom=None))}


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


def answer_questions(
    target: Target | GgufTarget,
    questions: Questions,
    *,
    settings: AnswerSettings,
    file: AnswerFile | None = None,
    on_answers: Callable[[list[Answered]], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_text: OnText | None = None,
) -> Speed:
    """Load a target and answer every question, a window at a time.

    Args:
        file: takes the answers and says how many it has already.
        on_answers: gets every finished window.
        on_text: gets the pieces of a single answer; with beams there are none.

    Raises:
        GemmaTuneError: the target cannot be loaded, or a question cannot be asked; nothing was answered then.
    """
    from gemma_tune.inference.load import load_target

    loaded = load_target(target)
    prompts = encode_questions(loaded, questions.rows)
    speed = Speed()
    for first in range(file.num_found if file else 0, len(prompts), settings.window):
        window = slice(first, first + settings.window)
        completions = _answer_window(
            loaded, prompts[window], first=first, total=len(prompts), settings=settings, speed=speed,
            on_progress=on_progress, on_text=on_text,
        )  # fmt: skip
        answers = [Answered(row, each) for row, each in zip(questions.rows[window], completions, strict=True)]
        if file is not None:
            file.write(answer.to_json() for answer in answers)
        if on_answers is not None:
            on_answers(answers)
    return speed


def _answer_window(
    loaded: LoadedTarget,
    prompts: Sequence[Sequence[int]],
    *,
    first: int,
    total: int,
    settings: AnswerSettings,
    speed: Speed,
    on_progress: Callable[[int, int], None] | None,
    on_text: OnText | None,
) -> list[Completion]:
    """Every window draws from a seed of its own, so that what is made after a kill is what would have been made."""
    sampling = settings.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + first)

    def tell(done: int, _: int) -> None:
        if on_progress is not None:
            on_progress(first + done, total)

    started = time.perf_counter()
    arguments = settings.arguments() | {"sampling": sampling}
    completions = loaded.complete(prompts, **arguments, on_progress=tell, on_text=on_text)
    speed.add(completions, seconds=time.perf_counter() - started)
    return completions


def open_answer_file(
    path: Path, target: Target | GgufTarget, questions: Questions, *, settings: AnswerSettings
) -> AnswerFile:
    """The file for answers, which goes on only with what decided the answers in it.

    Raises:
        DataError: as `AnswerFile`.
    """
    deciding = {
        "weights": _stamps(target),
        "template": target.template.sha256,
        "questions": questions.sha256,
        **settings.to_json(),
    }
    return AnswerFile(path, settings=deciding, window=settings.window)


def _stamps(target: Target | GgufTarget) -> dict[str, list[int]]:
    """Size and time of change of every file that holds weights: enough to tell that a model was made again."""
    if isinstance(target, GgufTarget):
        files: list[Path] = [target.path]
    else:
        directories = [target.base.directory, *([target.adapter] if target.adapter else [])]
        files = [path for directory in directories for path in sorted(directory.glob("*.safetensors"))]
    return {path.name: file_stamp(path) for path in files}
