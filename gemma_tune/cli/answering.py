"""Options that the commands share which ask a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from rich.markup import escape

from gemma_tune.inference.answer_settings import SAMPLER, AnswerSettings, Option, Sampling, options_of
from gemma_tune.terminal import Terminal

if TYPE_CHECKING:
    from gemma_tune.inference.target import GgufTarget, Target

TargetName = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run, an adapter, a merged directory, a GGUF file, or a model name.")
]
TemplateName = Annotated[str | None, typer.Option(help="Data template; a run brings its own.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model of a run, without its adapter.")]

OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write JSON lines to this file; the same command resumes where a killed one stopped."
    ),
]


def note_base(terminal: Terminal, target: Target | GgufTarget) -> None:
    """Say what of a target's base could not be compared with the training of its adapter."""
    if target.note is not None:
        terminal.note(f"[yellow]![/] {escape(target.note)}")


def with_answer_settings(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put the options of a sampler and of every field of `AnswerSettings` in the place of a command's `settings`.

    Args:
        without: fields that the command has no option for.
    """
    options = {"sampler": (str, SAMPLER), **options_of(Sampling), **options_of(AnswerSettings)}
    parameters = [_to_parameter(name, *options[name]) for name in options if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_settings(**given: Any) -> None:
            from gemma_tune.inference.sampling import make_answer_settings

            asked = {each.name: given.pop(each.name) for each in parameters}
            command(**given, settings=make_answer_settings(**asked))

        signature = inspect.signature(command, eval_str=True)
        all_parameters: list[inspect.Parameter] = []
        for each in signature.parameters.values():
            all_parameters += parameters if each.name == "settings" else [each]
        with_settings.__signature__ = signature.replace(parameters=all_parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {each.name: each.annotation for each in all_parameters}
        return with_settings

    return decorate


def _to_parameter(name: str, kind: Any, option: Option) -> inspect.Parameter:
    """The parameter that Typer makes an option of."""
    kinds = [each for each in get_args(kind) if each is not NoneType] if isinstance(kind, UnionType) else [kind]
    plain: Any = list[str] if get_origin(kinds[0]) is Sequence else kinds[0]
    offered = typer.Option(
        *([option.flag] if option.flag else []),
        help=option.help,
        min=option.minimum,
        show_default=option.default is not None,
        rich_help_panel=option.panel,
    )
    annotation: Any = Annotated[plain if option.default is not None else plain | None, offered]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)
