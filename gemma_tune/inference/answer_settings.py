"""What can be set of an answer. Every setting is declared once: type, bounds, and the help text of its option."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_type_hints

from gemma_tune.errors import DataError
from gemma_tune.text import suggestion

# Logits [batch, vocabulary] -> token ids [batch], or logits [batch, vocabulary] that a token is drawn from.
Sampler = Callable[[Any], Any]

_SAMPLING = "How tokens are chosen"
_BATCHES_PER_WINDOW = 4
_MAX_NEW_TOKENS = 256
_INFINITY = float("inf")


@dataclass(frozen=True)
class Option:
    """What a setting may be, and how the command line offers it."""

    help: str
    allowed: str = ""  # allowed, allows: the values that are allowed, in words and as a test
    allows: Callable[[Any], bool] = lambda _: True
    minimum: int | None = None  # the same for a count
    panel: str | None = None  # the heading that the option stands under
    flag: str | None = None  # its name where that is not the field's
    default: object = None  # where the command line decides what the field leaves open


# A sampler's name, which becomes a `Sampling` by `choose_sampling`.
SAMPLER = Option(
    "greedy, random, top-k, top-p, min-p, beam, or your own function: module:function or file.py:function. "
    "Left out, the options below say which.",
    panel=_SAMPLING,
)


def _setting(default: Any, /, *option: Any, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(*option, **more)})


_sampling = functools.partial(_setting, panel=_SAMPLING)
_ending = functools.partial(_setting, panel="When an answer ends")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default, temperature 0 and one beam, is greedy and deterministic."""

    # the logits are divided by it
    temperature: float = _sampling(
        0.0, "Above 1 wilder, below tamer; 0 is greedy.", "0 or more", lambda it: 0 <= it < _INFINITY
    )
    top_k: int | None = _sampling(None, "Draw among the k likeliest.", "at least 1", lambda it: it >= 1)
    # only the likeliest tokens whose probabilities sum up to it
    top_p: float | None = _sampling(
        None, "Draw among the likeliest of this mass.", "above 0, at most 1", lambda it: 0 < it <= 1
    )
    min_p: float | None = _sampling(
        None,
        "Draw among those at least this share as likely as the likeliest.",
        "between 0 and 1",
        lambda it: 0 <= it <= 1,
    )
    # continuations that are followed side by side; the likeliest as a whole is the answer
    num_beams: int = _sampling(1, "Follow this many continuations.", "at least 2", lambda it: it >= 2, flag="--beams")
    # logits of tokens that have occurred are divided by it (multiplied where negative)
    repetition_penalty: float = _sampling(
        1.0, "Above 1 repeats less.", "above 0; 1 changes nothing", lambda it: 0 < it < _INFINITY, default=1.0
    )
    seed: int | None = _sampling(None, "Of what is drawn.", default=0)  # of the draws; None draws differently each time
    # chooses instead of `temperature` to `num_beams`, from logits divided by `temperature` (1 where it is 0)
    custom: Sampler | None = field(default=None, repr=False)
    custom_name: str | None = None  # `module:function` of it

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn, rather than the likeliest taken."""
        return self.temperature > 0 or self.custom is not None


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made."""

    sampling: Sampling = field(default_factory=Sampling)
    # longest answer; None: what `max_length` leaves, and 256 without one
    max_new_tokens: int | None = _ending(
        None, "Longest answer, in tokens: 256, or what --max-length leaves.", minimum=1
    )
    # longest prompt and answer together; None: the model's context
    max_length: int | None = _ending(None, "Longest prompt and answer together, in tokens.", minimum=1)
    stop_strings: Sequence[str] = _ending(
        (), "A text that ends the answer and is left out of it; may be given several times.", flag="--stop"
    )
    batch_size: int = _setting(8, "Questions per forward pass.", minimum=1, default=8)

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            DataError: a setting is out of them.
        """
        check_bounds(AnswerSettings, {name: getattr(self, name) for name in options_of(AnswerSettings)})
        if not all(self.stop_strings):
            raise DataError("a stop string is empty", hint="leave it out: an empty text occurs everywhere")

    @property
    def longest_answer(self) -> int:
        """Tokens that an answer has at most, whatever its prompt leaves."""
        return self.max_new_tokens or self.max_length or _MAX_NEW_TOKENS

    @property
    def window(self) -> int:
        """Questions that are answered before the next ones are looked at.

        Prompts of one window are sorted by length before they are batched, so it is worth several batches; and what a
        kill can cost is one window.
        """
        return self.batch_size * _BATCHES_PER_WINDOW

    def to_json(self) -> dict[str, Any]:
        """What decides an answer, for a file of answers to compare."""
        values = {name: getattr(self, name) for name in options_of(AnswerSettings)}
        return values | {
            "sampling": asdict(replace(self.sampling, custom=None)),
            "max_new_tokens": self.longest_answer,
            "stop_strings": list(self.stop_strings),
        }


def options_of(settings: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Return type and option of every field that has one, by the field's name."""
    types = get_type_hints(settings)
    fields = dataclasses.fields(settings)
    return {each.name: (types[each.name], each.metadata["option"]) for each in fields if each.metadata}


def check_bounds(settings: type[Any], values: Mapping[str, Any]) -> None:
    """Refuse values that a field does not allow, and names that no field has; None is left to the field's default.

    Raises:
        DataError: names the setting, its value and what is allowed.
    """
    options = options_of(settings)
    for name, value in values.items():
        if name not in options:
            raise DataError(
                f"there is no setting {name!r}{suggestion(name, options)}", hint=f"settings: {', '.join(options)}"
            )
        _, option = options[name]
        if value is None:
            continue
        if option.minimum is not None and value < option.minimum:
            raise DataError(f"{name} is {value}", hint=f"allowed: {option.minimum} or more")
        if not option.allows(value):
            raise DataError(f"{name} is {value:g}", hint=f"allowed: {option.allowed}")
