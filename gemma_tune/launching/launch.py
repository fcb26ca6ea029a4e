"""Make the job file of a recipe for one scheduler, and hand it to that scheduler."""

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import JobFile, Resources, make_job
from gemma_tune.launching.kubernetes import KUBERNETES
from gemma_tune.launching.skypilot import SKYPILOT
from gemma_tune.launching.slurm import SLURM
from gemma_tune.members import Members
from gemma_tune.recipe.commented import write_new
from gemma_tune.recipe.load import LoadedRecipe
from gemma_tune.secrets import mask_secrets

SCHEDULERS = Members("scheduler", (SLURM, KUBERNETES, SKYPILOT))


def make_job_file(loaded: LoadedRecipe, on: str, resources: Resources, options: Mapping[str, Any]) -> JobFile:
    """Return the file of a job.

    Args:
        on: a name of SCHEDULERS.
        options: by their names on the command line; None, False and () are not given.

    Raises:
        LaunchError: an option is missing, belongs to another scheduler, or would put a credential into the file.
    """
    scheduler = SCHEDULERS[on]
    # Not `in`: 0 equals False, and --restarts 0 is given.
    given = {name: value for name, value in options.items() if not (value is None or value is False or value == ())}
    foreign = [name for name in given if name not in scheduler.option_names]
    if foreign:
        owners = [name for name, other in SCHEDULERS.items() if foreign[0] in other.option_names]
        raise LaunchError(
            f"--{foreign[0]} is not an option of {on}; it belongs to {' and '.join(owners)}", hint="leave it out"
        )
    missing = [f"--{name}" for name in scheduler.required if name not in given]
    if missing:
        raise LaunchError(f"--on {on} needs {' and '.join(missing)}", hint="see gemma-tune launch --help")
    job_file = scheduler.render(make_job(loaded, resources), scheduler.options(**given))
    if mask_secrets(job_file.text) != job_file.text:
        raise LaunchError(
            "the job file would hold a credential, from the recipe, an override or an option",
            hint="leave it in the environment: the job takes HF_TOKEN and WANDB_API_KEY from there",
        )
    return job_file


def write_job(path: Path, text: str) -> None:
    """Write a job file; one that is there with the same text is left as it is.

    Raises:
        RecipeError: another one is there, or it cannot be written.
    """
    if not (path.is_file() and path.read_bytes() == text.encode()):
        write_new(path, text)


def require_program(job_file: JobFile) -> None:
    """Raise LaunchError where the program that submits is missing."""
    program = job_file.submit[0]
    if shutil.which(program) is None:
        raise LaunchError(
            f"{program} is not on the PATH of this machine",
            hint=f"write the file with -o FILE, and submit it where {program} is",
        )


def submit_job(path: Path, job_file: JobFile, *, capture: bool) -> str | None:
    """Hand the file to its scheduler, which may ask the user something.

    Returns:
        What it printed, with `capture`; otherwise it prints itself.

    Raises:
        LaunchError: it did not take the job.
    """
    command = [*job_file.submit, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(
            f"{job_file.submit[0]} did not take the job (exit code {done.returncode}); it has said why",
            hint=f"the file is kept; again with: {shlex.join(command)}",
        )
    return done.stdout
