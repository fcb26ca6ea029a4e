"""A SkyPilot managed job: it looks for machines, and for others when they are taken away."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import (
    RENDEZVOUS_PORT,
    Job,
    JobFile,
    LocalPath,
    common_notes,
    local_paths,
    shell_lines,
)
from gemma_tune.launching.yaml_text import dump_documents

RUNS_DIR = "/gemma-tune-runs"
WORK_DIR = "~/sky_workdir"  # where SkyPilot runs the commands
_ENVIRONMENT = "$HOME/gemma-tune-env"
_EXTRAS = re.compile(r"(.+?)(\[[\w,.-]+\])?")

_HEADER = """\
Trains {run} on {nodes} × {gpus} GPU. Made by `gemma-tune launch`.
Runs lie in the bucket, so that the job goes on where it was when its machines are taken away and others are found.
Exit code 75 (interrupted, all saved) starts it again; any other failure ends it.
"""

_SETUP = """\
set -e
command -v uv >/dev/null || pip install uv
uv venv --allow-existing --python 3.12 "{environment}"
uv pip install --python "{environment}/bin/python" {requirement}
"""

_SEVERAL_NODES = """\
head=$(printf '%s\\n' "$SKYPILOT_NODE_IPS" | head -n 1)
{command} \\
  --node-rank "$SKYPILOT_NODE_RANK" --rendezvous "$head:{port}"
code=$?
# SkyPilot ends every machine with the first that exits; the first machine may still be saving.
if [ "$code" -eq 75 ] && [ "$SKYPILOT_NODE_RANK" -ne 0 ]; then sleep 60; fi
exit "$code"
"""


def render_skypilot(
    job: Job,
    *,
    bucket: str,
    install: str | None = None,
    image: str | None = None,
    cloud: str | None = None,
    spot: bool = False,
    before: tuple[str, ...] = (),
) -> JobFile:
    """Write the YAML of a managed job.

    Args:
        bucket: `s3://NAME`, `gs://NAME`, … that is there, or the name of one to be made.
        install: what pip installs: a wheel of this machine, a name or an address, also with `[extras]`.
        image: a Docker image with gemma-tune in it, instead of `install`.
        cloud: where: `aws`, `gcp/us-central1`, `k8s`, …; SkyPilot takes the cheapest otherwise.
        spot: machines that may be taken away at any moment, for a fraction of the price.
        before: shell lines that run before the training.

    Raises:
        LaunchError: the job would not have what it needs.
    """
    if (install is None) == (image is None):
        raise LaunchError(
            "--on skypilot needs --install or --image, and not both: the machines come without gemma-tune",
            hint="--install dist/gemma_tune-….whl (made by: pip wheel --no-deps -w dist .), or --image NAME",
        )
    if job.machines.gpus and job.machines.gpu_type is None:
        raise LaunchError("--on skypilot needs --gpu-type", hint="names as in `sky gpus list`, such as --gpu-type L4")
    paths = local_paths(job.recipe)
    if not job.is_shipped:
        paths.insert(0, LocalPath("the recipe", job.recipe_argument))
    requirement = None
    if install is not None:
        requirement, wheel = _find_requirement(install)
        paths += [LocalPath("--install", wheel)] if wheel else []
    _require_uploads(paths)
    mounts: dict[str, Any] = {f"{WORK_DIR}/{_normal(each.mounted)}": _normal(each.mounted) for each in paths}
    is_address = "://" in bucket
    mounts[RUNS_DIR] = {"source" if is_address else "name": bucket, "mode": "MOUNT_CACHED"}
    task: dict[str, Any] = {"name": job.label, "resources": _resources(job, image=image, cloud=cloud, spot=spot)}
    task |= {"num_nodes": job.machines.nodes, "file_mounts": mounts}
    if job.secrets:
        task["secrets"] = dict.fromkeys(job.secrets)
    if requirement is not None:
        task["setup"] = _SETUP.format(environment=_ENVIRONMENT, requirement=shlex.quote(requirement))
    task["run"] = _run(job, before=before, has_environment=requirement is not None)
    header = _HEADER.format(run=job.run_name, nodes=job.machines.nodes, gpus=job.machines.gpus)
    secrets = [word for name in job.secrets for word in ("--secret", name)]
    return JobFile(
        run_name=job.run_name,
        name=f"{job.run_name}.sky.yaml",
        text=dump_documents([task], header=header),
        submit=("sky", "jobs", "launch", *secrets),
        notes=(*common_notes(job.recipe), *_notes(job, paths)),
    )


def _resources(job: Job, *, image: str | None, cloud: str | None, spot: bool) -> dict[str, Any]:
    machines = job.machines
    resources: dict[str, Any] = {}
    if cloud is not None:
        resources["infra"] = cloud
    if machines.gpus:
        resources["accelerators"] = f"{machines.gpu_type}:{machines.gpus}"
    if machines.cpus:
        resources["cpus"] = f"{machines.cpus}+"
    if machines.memory_gib:
        resources["memory"] = f"{machines.memory_gib}+"
    if image is not None:
        resources["image_id"] = image if image.startswith("docker:") else f"docker:{image}"
    resources["use_spot"] = spot
    resources["job_recovery"] = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    return resources


def _find_requirement(install: str) -> tuple[str, str | None]:
    """What pip is told, and the file of this machine that it means."""
    match = _EXTRAS.fullmatch(install)
    path, extras = (match.group(1), match.group(2) or "") if match else (install, "")
    if os.path.isdir(path):
        raise LaunchError(
            f"--install {install} is a directory, of which every file would be uploaded",
            hint="make a wheel of it and name that: pip wheel --no-deps -w dist .",
        )
    if path.endswith((".whl", ".tar.gz")) and "://" not in path:
        return f"./{_normal(path)}{extras}", path
    return install, None


def _normal(path: str) -> str:
    return os.path.normpath(path)


def _require_uploads(paths: list[LocalPath]) -> None:
    outside = [f"{each.setting} ({each.path})" for each in paths if each.leaves_directory]
    if outside:
        raise LaunchError(
            f"outside of this directory, so that the job would not find it: {', '.join(outside)}",
            hint="copy it below this directory, or link to it, and name it relative to it",
        )
    missing = [f"{each.setting} ({each.path})" for each in paths if not Path(each.mounted).exists()]
    if missing:
        raise LaunchError(f"no such file, and it has to be uploaded: {', '.join(missing)}")
    whole = [f"{each.setting} ({each.path})" for each in paths if _normal(each.mounted) == "."]
    if whole:
        raise LaunchError(
            f"this whole directory would be uploaded for {', '.join(whole)}",
            hint="put the files into a directory of their own, such as rows/*.jsonl",
        )


def _run(job: Job, *, before: tuple[str, ...], has_environment: bool) -> str:
    words = job.command(
        job.loaded.name if job.is_shipped else _normal(job.recipe_argument), f"run.output_dir={RUNS_DIR}"
    )
    command = " \\\n  ".join(shell_lines(words))
    lines = [f'export PATH="{_ENVIRONMENT}/bin:$PATH"'] if has_environment else []
    lines += before
    start = "".join(f"{line}\n" for line in lines)
    if job.machines.nodes > 1:
        return start + _SEVERAL_NODES.format(command=command, port=RENDEZVOUS_PORT)
    return f"{start}{command}\n"


def _notes(job: Job, paths: list[LocalPath]) -> list[str]:
    notes = []
    if paths:
        uploads = ", ".join(dict.fromkeys(_normal(each.mounted) for each in paths))
        notes.append(f"call sky in this directory, from which it uploads {uploads}")
    if job.secrets:
        notes.append(f"sky takes {', '.join(job.secrets)} from the environment that calls it")
    return notes
