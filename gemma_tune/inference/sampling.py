"""How the next token is chosen: the samplers by name, their settings, and a function of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.errors import DataError, did_you_mean

# Logits [batch, vocabulary] -> token ids [batch], or logits [batch, vocabulary] that a token is drawn from.
Sampler = Callable[[Any], Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default, temperature 0 and one beam, is greedy and deterministic.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn from.
        top_p: only the likeliest tokens whose probabilities sum up to it.
        min_p: only tokens at least this share as likely as the likeliest.
        num_beams: continuations that are followed side by side; the likeliest as a whole is the answer.
        repetition_penalty: logits of tokens that have occurred are divided by it (multiplied where negative).
        seed: of the draws; None draws anew each time.
        custom: chooses instead of `temperature` to `num_beams`, from logits divided by `temperature` (1 where it is 0).
        custom_name: `module:function` of it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int | None = None
    custom: Sampler | None = field(default=None, repr=False)
    custom_name: str | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn, rather than the likeliest taken."""
        return self.temperature > 0 or self.custom is not None


@dataclass(frozen=True)
class _Named:
    """A sampler: the settings it takes, and its own value of the one that it is called after."""

    takes: tuple[str, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)


_FILTERS = ("temperature", "top_k", "top_p", "min_p")
SAMPLERS: dict[str, _Named] = {
    "greedy": _Named(()),
    "random": _Named(("temperature",), {"temperature": 1.0}),
    "top-k": _Named(_FILTERS, {"temperature": 1.0, "top_k": 50}),
    "top-p": _Named(_FILTERS, {"temperature": 1.0, "top_p": 0.9}),
    "min-p": _Named(_FILTERS, {"temperature": 1.0, "min_p": 0.1}),
    "beam": _Named(("num_beams",), {"num_beams": 4}),
}
_CUSTOM = _Named(("temperature",))
# What each setting may be, as a test and in words.
_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: 0 <= value < float("inf"), "0 or more"),
    "top_k": (lambda value: value >= 1, "at least 1"),
    "top_p": (lambda value: 0 < value <= 1, "above 0, at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "num_beams": (lambda value: value >= 2, "at least 2"),
    "repetition_penalty": (lambda value: 0 < value < float("inf"), "above 0; 1 changes nothing"),
}


def choose_sampling(
    sampler: str | Sampler | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    num_beams: int | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Sampling:
    """The sampling that a name, a function or the settings alone ask for.

    Args:
        sampler: a name of SAMPLERS, `module:function`, `file.py:function`, a callable, or None: then the settings say
            which one, and without any it is greedy.

    Raises:
        DataError: an unknown name, a setting out of its bounds or one that the sampler does not take.
    """
    asked = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "num_beams": num_beams,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in [*given.items(), ("repetition_penalty", repetition_penalty)]:
        is_allowed, words = _BOUNDS[name]
        if not is_allowed(value):
            raise DataError(f"{name} is {value:g}", hint=f"allowed: {words}")
    custom = custom_name = None
    if sampler is None:
        sampler = _implied(given)
    if callable(sampler):
        custom, custom_name = sampler, getattr(sampler, "__qualname__", type(sampler).__name__)
    elif ":" in sampler:
        custom, custom_name = load_sampler(sampler), sampler
    name = custom_name or str(sampler).strip().lower().replace("_", "-")
    named = _CUSTOM if custom else SAMPLERS.get(name)
    if named is None:
        raise DataError(
            f"there is no sampler {name!r}" + (f"; {near}" if (near := did_you_mean(name, SAMPLERS)) else ""),
            hint=f"samplers: {', '.join(SAMPLERS)}, or your own as module:function",
        )
    if name == "greedy" and given.get("temperature") == 0:
        del given["temperature"]  # the same, said twice
    for setting in given:
        if setting not in named.takes:
            others = [other for other, row in SAMPLERS.items() if setting in row.takes]
            raise DataError(
                f"the sampler {name} takes no {setting}", hint=f"leave it out, or use one of: {', '.join(others)}"
            )
    settings: dict[str, Any] = {**named.defaults, **given}
    if name != "random" and not settings.get("temperature", 1.0):
        raise DataError(f"the sampler {name} needs a temperature above 0", hint="temperature 0 is --sampler greedy")
    return Sampling(
        **settings, repetition_penalty=repetition_penalty, seed=seed, custom=custom, custom_name=custom_name
    )


def _implied(given: Mapping[str, float]) -> str:
    """The sampler that settings without a name ask for."""
    if "num_beams" in given:
        return "beam"
    filters = [name for name in ("top_k", "top_p", "min_p") if name in given]
    if filters:
        return filters[0].replace("_", "-")
    return "random" if given.get("temperature") else "greedy"


def load_sampler(name: str) -> Sampler:
    """Import `module:function` (as seen from the current directory) or `path/file.py:function`.

    Raises:
        DataError: there is no such module or function, importing it fails, or it cannot be called.
    """
    module_name, _, function_name = name.rpartition(":")
    shape = "give module:function or file.py:function; it gets logits [batch, vocabulary]"
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_here(module_name)
    except Exception as error:
        raise DataError(
            f"the sampler {name} cannot be imported: {type(error).__name__}: {error}", hint=shape
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        near = did_you_mean(function_name, [each for each in vars(module) if not each.startswith("_")])
        raise DataError(f"{module_name} has no {function_name!r}" + (f"; {near}" if near else ""), hint=shape)
    if not callable(function):
        raise DataError(f"{name} is {type(function).__name__}, not a function", hint=shape)
    sampler: Sampler = function
    return sampler


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_here(module_name: str) -> Any:
    """Import with the current directory first on the path, where a program of the command line does not look."""
    sys.path.insert(0, "")
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module_name)
    finally:
        sys.path.remove("")
