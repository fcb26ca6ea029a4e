"""What a program or a notebook calls: a function for each step, doing what the command of that name does.

Heavy libraries are imported when a function needs them. Progress is drawn on stderr as the commands draw it, and a
mistake is a `gemma_tune.errors.GemmaTuneError` whose message says what is wrong and whose hint says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from gemma_tune.recipe import load as recipes
from gemma_tune.recipe.load import LoadedRecipe
from gemma_tune.terminal import Terminal, TerminalReporter

if TYPE_CHECKING:
    from gemma_tune.exporting.export_formats import ExportOutcome
    from gemma_tune.inference.score import TextScore
    from gemma_tune.planning.verdict import Plan
    from gemma_tune.runs.layout import RunDir
    from gemma_tune.runs.reporter import Reporter

AnyPath = str | PathLike[str]
# A question as text, or the fields of a data template, such as {"instruction": …, "context": …}.
Question = str | Mapping[str, Any]


def load_recipe(recipe: AnyPath, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe: a file, or the name of a shipped one.

    Args:
        overrides: `section.field=value`, as on the command line.

    Raises:
        RecipeError: every mistake in one message.
    """
    return recipes.load_recipe(Path(recipe), overrides)


def plan(recipe: AnyPath | LoadedRecipe, overrides: Sequence[str] = (), *, gpu: str | None = None) -> Plan:
    """Whether a recipe fits on a card, how long it takes, and what would make it fit. Nothing is downloaded.

    Args:
        overrides: only where `recipe` is not loaded yet.
        gpu: a card such as t4, or GB=12; unless given, the one in this machine. Without any there is no verdict.

    Raises:
        EngineError: no such card, or it cannot compute what the recipe asks.
    """
    from gemma_tune.engines.choose import decide_for_card
    from gemma_tune.machine.cards import detect_card, find_card
    from gemma_tune.planning.plan import plan_recipe

    loaded = _loaded(recipe, overrides)
    card = find_card(gpu) if gpu else detect_card()
    return plan_recipe(loaded.recipe, card=card, decision=decide_for_card(loaded.recipe, card=card))


def train(
    recipe: AnyPath | LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    from_checkpoint: int | None = None,
    reporter: Reporter | None = None,
) -> RunDir:
    """Train a recipe, and return the run's directory.

    The engine of the first training stays for the whole process, because Unsloth rewires the libraries.

    Args:
        overrides: only where `recipe` is not loaded yet.
        resume: continue the interrupted run of this recipe; `run.resume=auto` does so only where there is one.
        from_checkpoint: the same, from the checkpoint of this step.
        reporter: is told of every step; unless given, it is drawn on stderr.

    Raises:
        TrainingInterrupted: stopped by the user or by training.max_minutes; what was trained is saved.
        CheckFailed: the run is finished, and an export of it does not compare as it should.
        ExportError: the run is finished, and an export of it cannot be made.
    """
    from gemma_tune.flows import train as flow

    loaded = _loaded(recipe, overrides)
    with _reporting(reporter) as told:
        outcome = flow.train(loaded, reporter=told, resume=resume, from_step=from_checkpoint)
    outcome.require_exported()
    return outcome.run


def export(
    source: AnyPath,
    formats: str | Sequence[str],
    *,
    output: AnyPath | None = None,
    base: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    max_shard_gb: float = 5.0,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> ExportOutcome:
    """Write a run or an adapter in one or more formats, and prove each of them.

    Args:
        formats: such as merged-16bit, gguf-q8_0, ollama; a wrong name lists all.
        output: directory that gets a directory a format; RUN/export unless given.
        base: base model of an adapter that names none.
        dtype: of merged weights; auto keeps the base's.
        max_shard_gb: largest safetensors file, in 10^9 bytes.
        verify: run every export and compare it with base + adapter.

    Raises:
        CheckFailed: an export was written and does not compare as it should.
        ExportError: it cannot be made.
    """
    from gemma_tune.exporting.export_settings import ExportSettings
    from gemma_tune.flows.export import export_model
    from gemma_tune.machine.quiet import libraries_to

    with _reporting(reporter) as told, libraries_to(None):
        outcome = export_model(
            Path(source),
            [formats] if isinstance(formats, str) else formats,
            settings=ExportSettings.of(dtype=dtype, max_shard_gb=max_shard_gb, verify=verify),
            reporter=told,
            output=None if output is None else Path(output),
            base=base,
        )
    outcome.require_passed()
    return outcome


def merge(
    source: AnyPath,
    *,
    output: AnyPath | None = None,
    base: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    max_shard_gb: float = 5.0,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> ExportOutcome:
    """Merge an adapter into its 16-bit base: `export` with the format merged-16bit."""
    return export(
        source,
        "merged-16bit",
        output=output,
        base=base,
        dtype=dtype,
        max_shard_gb=max_shard_gb,
        verify=verify,
        reporter=reporter,
    )


@overload
def generate(
    target: AnyPath, questions: Question, *, template: str | None = ..., sampler: str = ..., **settings: Any
) -> str: ...
@overload
def generate(
    target: AnyPath, questions: Sequence[Question], *, template: str | None = ..., sampler: str = ..., **settings: Any
) -> list[str]: ...
def generate(
    target: AnyPath,
    questions: Question | Sequence[Question],
    *,
    template: str | None = None,
    sampler: str = "greedy",
    seed: int | None = None,
    **settings: Any,
) -> str | list[str]:
    """Load a run, an adapter, a merged directory, a GGUF or a model, and answer one question or several.

    Every call loads it again: to ask more than once, or for a sampler's numbers, keep what `load` returns.

    Args:
        settings: as in `Gemma.generate`: max_new_tokens, max_length, stop_strings, batch_size.

    Raises:
        GemmaTuneError: as `load`, and a question that lacks what the template reads.
    """
    from gemma_tune.inference.notebook import load

    model = load(str(target), template=template)
    model.compile(sampler, seed=seed)
    return model.generate(questions, **settings)


def score(target: AnyPath, question: Question, response: str, *, template: str | None = None) -> TextScore:
    """How likely a model finds a response to a question: log-likelihood, perplexity, and every token's share.

    Every call loads the model again; what `load` returns scores more than once, and token ids layer by layer.

    Raises:
        GemmaTuneError: as `load`.
    """
    from gemma_tune.inference.notebook import load

    return load(str(target), template=template).score_response(question, response)


def _loaded(recipe: AnyPath | LoadedRecipe, overrides: Sequence[str]) -> LoadedRecipe:
    if not isinstance(recipe, LoadedRecipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise TypeError("overrides belong into load_recipe: this recipe is loaded already")
    return recipe


@contextmanager
def _reporting(reporter: Reporter | None) -> Iterator[Reporter]:
    if reporter is not None:
        yield reporter
        return
    with TerminalReporter(Terminal()) as drawn:
        yield drawn
