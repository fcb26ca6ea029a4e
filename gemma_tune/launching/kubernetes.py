"""A Kubernetes Job whose pods go on by themselves after an eviction, a drained node or a lost one."""

from __future__ import annotations

import os
import re
from typing import Any

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import (
    GRACE_SECONDS,
    RENDEZVOUS_PORT,
    RESTARTS,
    Job,
    JobFile,
    common_notes,
    local_paths,
    parse_time,
)
from gemma_tune.launching.yaml_text import dump_documents

WORK_DIR = "/volume"
RECIPE_DIR = "/etc/gemma-tune"
GPU_LABEL = "nvidia.com/gpu.product"
_CONTAINER = "train"
_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

_HEADER = """\
Trains {run} on {nodes} × {gpus} GPU. Made by `gemma-tune launch`.
The claim {claim} is mounted at {work}: runs, caches, and rows of your own lie there and outlive the pods.
Exit code 75 (interrupted, all saved) and evictions start a pod again and count as no failure; 2, 3 and 4 end the job,
as another attempt would end the same way; anything else is tried again, {restarts} times a machine.
No credential stands here: {secrets} come from the Secret {secret}, if it is there.
"""


def render_kubernetes(
    job: Job,
    *,
    image: str,
    claim: str,
    namespace: str | None = None,
    secret: str = "gemma-tune",
    time: str | None = None,
    grace: int = GRACE_SECONDS,
    restarts: int = RESTARTS,
) -> JobFile:
    """Write a ConfigMap with the recipe, a Job, and for several machines the Service by which they find each other.

    Args:
        image: holds gemma-tune and CUDA.
        claim: a PersistentVolumeClaim that is there; ReadWriteMany for several machines.
        secret: a Secret with HF_TOKEN or WANDB_API_KEY in it; it may be missing.
        time: limit of the whole job with all its attempts, such as `12h`.
        grace: seconds that a pod has to save before it is killed.
        restarts: how often a failure is tried again at most.

    Raises:
        LaunchError: a name is none, or the recipe reads what the pods would not see.
    """
    for option, value in (("--claim", claim), ("--namespace", namespace), ("--secret", secret)):
        if value is not None and not _DNS_LABEL.fullmatch(value):
            raise LaunchError(f"{option} {value!r} is no name for Kubernetes", hint="lower-case letters, digits and -")
    on_volume = _require_on_volume(job)
    file = f"{job.label}.yaml"
    labels = {"app.kubernetes.io/name": "gemma-tune", "app.kubernetes.io/instance": job.label}
    metadata: dict[str, Any] = {"name": job.label, "labels": labels}
    if namespace is not None:
        metadata["namespace"] = namespace
    documents: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {file: job.loaded.text}}
    ]
    nodes = job.machines.nodes
    if nodes > 1:
        documents.append(_service(metadata))
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": restarts * nodes,
        "podFailurePolicy": {"rules": _failure_rules()},
    }
    if time is not None:
        spec["activeDeadlineSeconds"] = parse_time(time)
    spec["template"] = {
        "metadata": {"labels": labels},
        "spec": _pod(job, image=image, claim=claim, secret=secret, grace=grace, file=file),
    }
    documents.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})
    header = _HEADER.format(
        run=job.run_name,
        nodes=nodes,
        gpus=job.machines.gpus,
        claim=claim,
        work=WORK_DIR,
        restarts=restarts,
        secrets=" and ".join(_SECRETS),
        secret=secret,
    )
    return JobFile(
        run_name=job.run_name,
        name=f"{job.run_name}.k8s.yaml",
        text=dump_documents(documents, header=header),
        submit=("kubectl", "apply", "-f"),
        notes=(
            *common_notes(job.recipe),
            *_notes(job, claim=claim, secret=secret, on_volume=on_volume),
        ),
    )


def _require_on_volume(job: Job) -> list[str]:
    """The paths that the run reads, all of them on the volume.

    Raises:
        LaunchError: some are elsewhere.
    """
    read = [(each.setting, each.path) for each in local_paths(job.recipe)]
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


def _service(metadata: dict[str, Any]) -> dict[str, Any]:
    """Gives each pod a name; pods that wait for each other are not ready, and are found all the same."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app.kubernetes.io/instance": metadata["name"]},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def _failure_rules() -> list[dict[str, Any]]:
    """The first that fits decides; what fits none counts towards backoffLimit."""

    def on_exit(action: str, *codes: int) -> dict[str, Any]:
        return {
            "action": action,
            "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": list(codes)},
        }

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_exit("Ignore", 75),
        on_exit("FailJob", 2, 3, 4),
    ]


def _pod(job: Job, *, image: str, claim: str, secret: str, grace: int, file: str) -> dict[str, Any]:
    machines = job.machines
    command = [_escape(word) for word in job.command(f"{RECIPE_DIR}/{file}")]
    if machines.nodes > 1:
        # Pod N of an Indexed Job has the host name JOB-N; the index is put in by Kubernetes.
        address = f"{job.label}-0.{job.label}:{RENDEZVOUS_PORT}"
        command += ["--node-rank", "$(JOB_COMPLETION_INDEX)", "--rendezvous", address]
    environment: list[dict[str, Any]] = [
        {"name": "HF_HOME", "value": f"{WORK_DIR}/.cache/huggingface"},
        {"name": "GEMMA_TUNE_CACHE", "value": f"{WORK_DIR}/.cache/gemma-tune"},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]
    environment += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}
        for name in _SECRETS
    ]
    limits: dict[str, Any] = {}
    if machines.gpus:
        limits["nvidia.com/gpu"] = machines.gpus
    if machines.cpus:
        limits["cpu"] = machines.cpus
    if machines.memory_gib:
        limits["memory"] = f"{machines.memory_gib}Gi"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the Job starts a pod again, by its rules
        "terminationGracePeriodSeconds": grace,
        "containers": [
            {
                "name": _CONTAINER,
                "image": image,
                "workingDir": WORK_DIR,
                "command": command,
                "env": environment,
                "resources": {"limits": limits, "requests": limits},
                "volumeMounts": [
                    {"name": "work", "mountPath": WORK_DIR},
                    {"name": "recipe", "mountPath": RECIPE_DIR, "readOnly": True},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "recipe", "configMap": {"name": job.label}},
            # NCCL's shared memory: the usual 64 MB are not enough for several cards.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if machines.nodes > 1:
        pod["subdomain"] = job.label
    if machines.gpu_type:
        key, _, value = machines.gpu_type.rpartition("=")
        pod["nodeSelector"] = {key or GPU_LABEL: value}
    if machines.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _escape(word: str) -> str:
    """A word of a command as Kubernetes leaves it: it puts values in for $(NAME), and one $ for two."""
    return word.replace("$", "$$")


def _notes(job: Job, *, claim: str, secret: str, on_volume: list[str]) -> list[str]:
    notes = []
    if on_volume:
        notes.append(f"has to lie on the volume of {claim}, by the same name from its root: {', '.join(on_volume)}")
    if job.machines.nodes > 1:
        notes.append(f"{claim} is mounted by {job.machines.nodes} machines, so it has to be ReadWriteMany")
    if job.secrets:
        keys = " ".join(f"--from-file={name}=FILE" for name in job.secrets)
        notes.append(f"the run may need {', '.join(job.secrets)}: kubectl create secret generic {secret} {keys}")
    return notes
