"""How the next token is chosen: the samplers by name, their settings, and a function of the user's own."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.errors import DataError
from gemma_tune.inference.answer_settings import AnswerSettings, Sampler, Sampling, check_bounds, options_of
from gemma_tune.text import suggestion


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
# What every sampler takes.
_ALWAYS = ("repetition_penalty", "seed")


def make_answer_settings(sampler: str | Sampler | None = None, **settings: Any) -> AnswerSettings:
    """Make the settings of an answer from a flat list: a sampler, and fields of `Sampling` and of `AnswerSettings`.

    Raises:
        DataError: as `choose_sampling`, or a setting of the answer is out of its bounds.
    """
    of_answer = {name: settings.pop(name) for name in options_of(AnswerSettings) if name in settings}
    given = {name: value for name, value in of_answer.items() if value is not None}
    return AnswerSettings(choose_sampling(sampler, **settings), **given)


def choose_sampling(sampler: str | Sampler | None = None, **settings: Any) -> Sampling:
    """The sampling that a name, a function or the settings alone ask for.

    Args:
        sampler: a name of SAMPLERS, `module:function`, `file.py:function`, a callable, or None: then the settings say
            which one, and without any it is greedy.
        settings: fields of `Sampling`; None leaves one to the sampler.

    Raises:
        DataError: an unknown name, a setting out of its bounds or one that the sampler does not take.
    """
    check_bounds(Sampling, settings)
    given = {name: value for name, value in settings.items() if value is not None}
    always = {name: given.pop(name) for name in _ALWAYS if name in given}
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
            f"there is no sampler {name!r}{suggestion(name, SAMPLERS)}",
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
    chosen: dict[str, Any] = {**named.defaults, **given}
    if name != "random" and not chosen.get("temperature", 1.0):
        raise DataError(f"the sampler {name} needs a temperature above 0", hint="temperature 0 is --sampler greedy")
    return Sampling(**chosen, **always, custom=custom, custom_name=custom_name)


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
        near = suggestion(function_name, [each for each in vars(module) if not each.startswith("_")])
        raise DataError(f"{module_name} has no {function_name!r}{near}", hint=shape)
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
