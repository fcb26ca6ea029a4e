"""Write a Kubernetes Job whose pods resume by themselves after an eviction, a drained node or a lost one."""

import os
import re
from dataclasses import dataclass

from gemma_tune.errors import LaunchError
from gemma_tune.launching import job as jobs

WORK_DIR = "/volume"
_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class KubernetesOptions:
    """What a Kubernetes Job has besides its resources."""

    image: str  # holds gemma-tune and CUDA
    claim: str  # a PersistentVolumeClaim that is there; ReadWriteMany for several machines
    namespace: str | None = None
    secret: str = "gemma-tune"  # a Secret with HF_TOKEN or WANDB_API_KEY in it; it may be missing
    time: str | None = None  # limit of the whole job with all its attempts, such as `12h`
    grace: int = jobs.GRACE_SECONDS  # seconds that a pod has to save before it is killed
    restarts: int = jobs.RESTARTS  # how often a failure is tried again at most


def render_kubernetes(job: jobs.Job, options: KubernetesOptions) -> jobs.JobFile:
    """Return a ConfigMap with the recipe, a Job, and for several machines the Service by which they find each other.

    Raises:
        LaunchError: a name is not one of Kubernetes', or the recipe reads what the pods would not see.
    """
    names = (("--claim", options.claim), ("--namespace", options.namespace), ("--secret", options.secret))
    for option, value in names:
        if value is not None and not _DNS_LABEL.fullmatch(value):
            raise LaunchError(
                f"{option} {value!r} is not a name of Kubernetes", hint="lower-case letters, digits and -"
            )
    on_volume = _require_on_volume(job)
    values = {
        "options": options,
        "deadline_seconds": None if options.time is None else jobs.parse_time(options.time),
        "work_dir": WORK_DIR,
    }
    submit, notes = ["kubectl", "apply", "-f"], _notes(job, options, on_volume)
    return jobs.fill_template("kubernetes.yaml.j2", job, values, suffix="k8s.yaml", submit=submit, notes=notes)


KUBERNETES = jobs.Scheduler("kubernetes", KubernetesOptions, render_kubernetes)


def _require_on_volume(job: jobs.Job) -> list[str]:
    """Return the paths that the run reads, all of them on the volume. Raises LaunchError: some are elsewhere."""
    read = [(each.setting, each.path) for each in jobs.local_paths(job.recipe)]
    used = [*read, ("run.output_dir", job.recipe.run.output_dir)]
    outside = [f"{setting}={path}" for setting, path in used if not _is_on_volume(path)]
    if outside:
        raise LaunchError(
            f"the pods would not see {', '.join(outside)}: of this machine's files they have none",
            hint=f"copy it to the volume claim and name it relative to its root, or as {WORK_DIR}/…",
        )
    return [path for _, path in read]


def _is_on_volume(path: str) -> bool:
    normal = os.path.normpath(path)
    return normal.startswith(f"{WORK_DIR}/") or not normal.startswith(("/", "~", ".."))


def _notes(job: jobs.Job, options: KubernetesOptions, on_volume: list[str]) -> list[str]:
    notes, claim = [], options.claim
    if on_volume:
        notes.append(f"has to lie on the volume of {claim}, by the same name from its root: {', '.join(on_volume)}")
    if job.resources.nodes > 1:
        notes.append(f"{claim} is mounted by {job.resources.nodes} machines, so it has to be ReadWriteMany")
    if job.secrets:
        keys = " ".join([options.secret, *(f"--from-file={name}=FILE" for name in job.secrets)])
        notes.append(f"the run may need {', '.join(job.secrets)}: kubectl create secret generic {keys}")
    return notes
