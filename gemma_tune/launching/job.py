"""Describe what a job runs and on what, before it is written for a scheduler."""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from gemma_tune.data.rows.template import list_templates
from gemma_tune.data.sources.source import is_local, split_count
from gemma_tune.errors import LaunchError, ModelError
from gemma_tune.identity import text_sha256
from gemma_tune.models.catalogue import find_model
from gemma_tune.paths import RECIPES_DIR
from gemma_tune.recipe.load import LoadedRecipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.templates import render_template
from gemma_tune.yaml_io import YAML_FILTERS

_TEMPLATES_DIR = Path(__file__).parent / "templates"
# Seconds between the signal to stop and the end: a long step, and a checkpoint of adapter and optimizer.
GRACE_SECONDS = 180
RESTARTS = 20

_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")
_WORD = re.compile(r"[^\s'\"\\#$`]+")
_WILDCARD = re.compile(r"[*?[]")
# Names of Kubernetes: a DNS label, with room for the number of a pod and within the 63 characters of one.
_MAX_LABEL = 50


@dataclass(frozen=True)
class Resources:
    """What a job asks for. `gpus`, `cpus` and `memory_gib` (GiB) are those of one machine; None asks for nothing."""

    nodes: int = 1
    gpus: int = 1
    gpu_type: str | None = None
    cpus: int | None = None
    memory_gib: int | None = None


@dataclass(frozen=True)
class LocalPath:
    """A file, a directory or a pattern of files that a setting of the recipe names, as it is written there."""

    setting: str
    path: str

    @property
    def mounted(self) -> str:
        """The path without the part that has wildcards."""
        parts = Path(self.path).parts
        fixed = next((number for number, part in enumerate(parts) if _WILDCARD.search(part)), len(parts))
        return str(Path(*parts[:fixed]))

    @property
    def leaves_directory(self) -> bool:
        """Whether it lies outside of the working directory, by its name."""
        return os.path.isabs(self.path) or self.path.startswith("~") or ".." in Path(self.path).parts


@dataclass(frozen=True)
class Job:
    """One training as every scheduler runs it."""

    loaded: LoadedRecipe
    run_name: str  # fixed, so that a job that starts again finds its run
    overrides: tuple[str, ...]  # those of the command line, then run.name and run.resume
    resources: Resources
    # environment variables with a credential that the run may need; their values are never written
    secrets: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def is_shipped(self) -> bool:
        """Whether the recipe comes with gemma-tune, so that its name is enough everywhere."""
        return self.loaded.path.parent == RECIPES_DIR

    @property
    def recipe_argument(self) -> str:
        """The recipe as the command names it where this directory is there."""
        return self.loaded.name if self.is_shipped else str(self.loaded.path)

    @property
    def label(self) -> str:
        """The run's name as a DNS label; two runs never share one."""
        name = f"gemma-tune-{self.run_name}"
        label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_MAX_LABEL].strip("-")
        return label if label == name else f"{label[: _MAX_LABEL - 7]}-{text_sha256(name)[:6]}"

    def command(self, recipe: str, *more: str) -> list[str]:
        """Return the command line, but for the number of the machine and the address of the first.

        Args:
            recipe: where the job finds the recipe.
            more: overrides that the scheduler adds; the last of several counts.
        """
        words = ["gemma-tune", "train", recipe, *self.overrides, *more]
        processes = max(self.resources.gpus, 1)
        if self.resources.nodes > 1:
            return [*words, "--nproc", str(processes), "--nnodes", str(self.resources.nodes)]
        return [*words, "--nproc", str(processes)] if processes > 1 else words


@dataclass(frozen=True)
class JobFile:
    """A job for one scheduler: the file's text, its name where the user gives none, and the command that submits it,
    to which the name is added. `notes` are what the user has to see to, a sentence each."""

    run_name: str
    name: str
    text: str
    submit: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Scheduler:
    """One way to get machines."""

    name: str
    # a dataclass of those command-line options that not every scheduler has; those without a default are required
    options: type[Any]
    render: Callable[[Job, Any], JobFile]  # writes a Job with such options

    @property
    def option_names(self) -> list[str]:
        return [field.name for field in fields(self.options)]

    @property
    def required(self) -> list[str]:
        return [field.name for field in fields(self.options) if field.default is MISSING]


def shell_lines(words: list[str]) -> list[str]:
    """Return a command line quoted for the shell, in readable lines: an override or an option a line."""
    lines = [shlex.join(words[:3])]
    for word in words[3:]:
        if lines[-1].startswith("--") and " " not in lines[-1]:
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    return lines


def make_job(loaded: LoadedRecipe, resources: Resources) -> Job:
    """Fix the name of the run and let it resume by itself."""
    allowed = re.sub(r"[^A-Za-z0-9._-]", "-", loaded.name).lstrip("-.")[:64]
    name = loaded.recipe.run.name or allowed or "run"
    kept = [item for item in loaded.overrides if item.partition("=")[0].strip() not in ("run.name", "run.resume")]
    if resources.gpu_type is not None:
        require_word("--gpu-type", resources.gpu_type)
    return Job(
        loaded=loaded,
        run_name=name,
        overrides=(*kept, f"run.name={name}", "run.resume=auto"),
        resources=resources,
        secrets=tuple(_secrets(loaded.recipe)),
    )


def _secrets(recipe: Recipe) -> Iterator[str]:
    try:
        is_open = not find_model(recipe.model.name).is_gated
    except ModelError:  # a directory, or something of the hub that only a token may open
        is_open = False
    if not is_open:
        yield "HF_TOKEN"
    if "wandb" in recipe.logging.trackers:
        yield "WANDB_API_KEY"


def local_paths(recipe: Recipe) -> list[LocalPath]:
    """Return everything next to the recipe that the run reads from the disk."""
    data = recipe.data
    sources = [("data.source", data.source), ("data.eval_source", data.eval_source)]
    sources += [(f"data.mix.{number}.source", part.source) for number, part in enumerate(data.mix)]
    templates = [("data.template", data.template)]
    templates += [(f"data.mix.{number}.template", part.template or "auto") for number, part in enumerate(data.mix)]
    found = [
        LocalPath(setting, split_count(source)[0])
        for setting, source in sources
        if source is not None and is_local(split_count(source)[0])
    ]
    shipped = {"auto", *list_templates()}
    found += [LocalPath(setting, template) for setting, template in templates if template not in shipped]
    if _is_model_directory(recipe.model.name):
        found.append(LocalPath("model.name", recipe.model.name))
    if recipe.model.adapter is not None:
        found.append(LocalPath("model.adapter", recipe.model.adapter))
    return found


def _is_model_directory(name: str) -> bool:
    return name.startswith((".", "/", "~")) or ("/" in name and os.path.isdir(name))


def fill_template(
    template: str, job: Job, values: Mapping[str, Any], *, suffix: str, submit: Sequence[str], notes: Sequence[str]
) -> JobFile:
    """Return the file of a job, from a template of this folder and what it reads besides `job`."""
    filters = {**YAML_FILTERS, "quote": shlex.quote}
    text = render_template(_TEMPLATES_DIR / template, {"job": job, **values}, filters=filters)
    name = f"{job.run_name}.{suffix}"
    return JobFile(job.run_name, name, text, tuple(submit), (*_common_notes(job.recipe), *notes))


def _common_notes(recipe: Recipe) -> list[str]:
    """Return what a job that may be stopped and started again does with the recipe's own settings."""
    training, notes = recipe.training, []
    if training.save_every_steps is None and training.save_every_minutes is None:
        notes.append(
            "a machine that is lost takes up to a tenth of the run with it; training.save_every_minutes=15 bounds that"
        )
    if training.max_minutes is not None:
        notes.append(
            f"training.max_minutes={training.max_minutes:g} ends an attempt, and the job resumes with the next: "
            "it does not limit the whole run"
        )
    return notes


def require_word(option: str, value: str) -> str:
    """Return a value that goes into a line of the file as it is.

    Raises:
        LaunchError: it holds a blank, a quote or another sign with a meaning.
    """
    if not _WORD.fullmatch(value):
        raise LaunchError(f"{option} {value!r} holds a blank, a quote or another sign that no name has")
    return value


def parse_time(text: str) -> int:
    """Return seconds: `1d12h`, `90m`. Raises LaunchError: it is written otherwise."""
    match = _TIME.fullmatch(text)
    days, hours, minutes = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    seconds = ((days * 24 + hours) * 60 + minutes) * 60
    if seconds == 0:
        raise LaunchError(f"--time {text!r} is not a length of time", hint="write 90m, 12h or 1d12h30m")
    return seconds
