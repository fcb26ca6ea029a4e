"""Write a SkyPilot managed job: it looks for machines, and for others when they are taken away."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import LaunchError
from gemma_tune.launching import job as jobs

RUNS_DIR = "/gemma-tune-runs"
_EXTRAS = re.compile(r"(.+?)(\[[\w,.-]+\])?")


@dataclass(frozen=True)
class SkypilotOptions:
    """What a SkyPilot job has besides its resources."""

    bucket: str  # `s3://NAME`, `gs://NAME`, … that is there, or the name of one to be made
    install: str | None = None  # what pip installs: a wheel of this machine, a name or an address, also with `[extras]`
    image: str | None = None  # a Docker image with gemma-tune in it, instead of `install`
    cloud: str | None = None  # where: `aws`, `gcp/us-central1`, `k8s`, …; SkyPilot takes the cheapest otherwise
    spot: bool = False  # machines that may be taken away at any moment, for a fraction of the price
    before: tuple[str, ...] = ()  # shell lines that run before the training


def render_skypilot(job: jobs.Job, options: SkypilotOptions) -> jobs.JobFile:
    """Return the YAML of a managed job. Raises LaunchError: the job would not have what it needs."""
    if (options.install is None) == (options.image is None):
        raise LaunchError(
            "--on skypilot needs --install or --image, and not both: the machines come without gemma-tune",
            hint="--install dist/gemma_tune-….whl (made by: pip wheel --no-deps -w dist .), or --image NAME",
        )
    if job.resources.gpus and job.resources.gpu_type is None:
        raise LaunchError("--on skypilot needs --gpu-type", hint="names as in `sky gpus list`, such as --gpu-type L4")
    paths = jobs.local_paths(job.recipe)
    if not job.is_shipped:
        paths.insert(0, jobs.LocalPath("the recipe", job.recipe_argument))
    requirement, wheel = _find_requirement(options.install) if options.install is not None else ("", None)
    paths += [jobs.LocalPath("--install", wheel)] if wheel else []
    _require_uploads(paths)
    uploads = list(dict.fromkeys(os.path.normpath(each.mounted) for each in paths))
    recipe = job.loaded.name if job.is_shipped else os.path.normpath(job.recipe_argument)
    values = {
        "options": options,
        "requirement": requirement,
        "uploads": uploads,
        "command": jobs.shell_lines(job.command(recipe, f"run.output_dir={RUNS_DIR}")),
        "runs_dir": RUNS_DIR,
    }
    submit = ["sky", "jobs", "launch", *(word for name in job.secrets for word in ("--secret", name))]
    notes = _notes(job, uploads)
    return jobs.fill_template("skypilot.yaml.j2", job, values, suffix="sky.yaml", submit=submit, notes=notes)


SKYPILOT = jobs.Scheduler("skypilot", SkypilotOptions, render_skypilot)


def _find_requirement(install: str) -> tuple[str, str | None]:
    """Return what pip is asked for, and the file of this machine that it means."""
    match = _EXTRAS.fullmatch(install)
    path, extras = (match.group(1), match.group(2) or "") if match else (install, "")
    if os.path.isdir(path):
        raise LaunchError(
            f"--install {install} is a directory, of which every file would be uploaded",
            hint="make a wheel of it and name that: pip wheel --no-deps -w dist .",
        )
    if path.endswith((".whl", ".tar.gz")) and "://" not in path:
        return f"./{os.path.normpath(path)}{extras}", path
    return install, None


def _require_uploads(paths: list[jobs.LocalPath]) -> None:
    outside = [f"{each.setting} ({each.path})" for each in paths if each.leaves_directory]
    if outside:
        raise LaunchError(
            f"outside of this directory, so that the job would not find it: {', '.join(outside)}",
            hint="copy it below this directory, or link to it, and name it relative to it",
        )
    missing = [f"{each.setting} ({each.path})" for each in paths if not Path(each.mounted).exists()]
    if missing:
        raise LaunchError(f"no such file, and it has to be uploaded: {', '.join(missing)}")
    whole = [f"{each.setting} ({each.path})" for each in paths if os.path.normpath(each.mounted) == "."]
    if whole:
        raise LaunchError(
            f"this whole directory would be uploaded for {', '.join(whole)}",
            hint="put the files into a directory of their own, such as rows/*.jsonl",
        )


def _notes(job: jobs.Job, uploads: list[str]) -> list[str]:
    notes = []
    if uploads:
        notes.append(f"call sky in this directory, from which it uploads {', '.join(uploads)}")
    if job.secrets:
        notes.append(f"sky takes {', '.join(job.secrets)} from the environment that calls it")
    return notes
