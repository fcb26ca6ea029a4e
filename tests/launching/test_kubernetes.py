"""The Kubernetes file, read by PyYAML, and its command as Kubernetes would run it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import Job, JobFile
from gemma_tune.launching.kubernetes import KubernetesOptions, render_kubernetes
from gemma_tune.recipe.load import load_recipe
from tests.launching.fake_programs import Cluster
from tests.launching.jobs import HOSTILE, job_of


def render(job: Job, **options: Any) -> JobFile:
    return render_kubernetes(job, KubernetesOptions(**{"image": "i", "claim": "work", **options}))


def _documents(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def _container(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def _expanded(word: str, environment: dict[str, str]) -> str:
    """As the reference of container.command says: $(NAME) is replaced where NAME is known, $$ is one $."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^()]*)\)", value, word)


def test_one_machine(recipe_file: Path) -> None:
    job = job_of(recipe_file, gpus=2, cpus=16, memory_gib=64, gpu_type="NVIDIA-L4")
    made = render(job, image="reg.example/gemma:1", claim="work", namespace="ml", time="12h", grace=90)
    documents = _documents(made.text)
    assert set(documents) == {"ConfigMap", "Job"}
    assert {document["metadata"]["namespace"] for document in documents.values()} == {"ml"}
    assert documents["ConfigMap"]["data"] == {"gemma-tune-mine.yaml": recipe_file.read_text()}
    spec = documents["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (1, 1, 20)
    assert spec["completionMode"] == "Indexed" and spec["activeDeadlineSeconds"] == 43_200
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 90 and pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    container = _container(documents["Job"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "cpu": 16, "memory": "64Gi"}
    assert container["command"][:3] == ["gemma-tune", "train", "/etc/gemma-tune/gemma-tune-mine.yaml"]
    assert container["command"][-2:] == ["--nproc", "2"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/volume"]]["persistentVolumeClaim"] == {"claimName": "work"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    assert volumes[mounts["/etc/gemma-tune"]]["configMap"] == {"name": documents["ConfigMap"]["metadata"]["name"]}
    assert made.submit == ("kubectl", "apply", "-f")


def test_a_label_of_another_kind(recipe_file: Path) -> None:
    job = job_of(recipe_file, gpu_type="cloud.google.com/gke-accelerator=nvidia-l4")
    pod = _documents(render(job).text)["Job"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}


def test_a_processor_alone(recipe_file: Path) -> None:
    job = _documents(render(job_of(recipe_file, gpus=0)).text)["Job"]
    assert _container(job)["resources"]["limits"] == {}
    assert "tolerations" not in job["spec"]["template"]["spec"]


def test_several_machines_find_the_first(recipe_file: Path) -> None:
    """Pod N of an Indexed Job is called JOB-N; its subdomain has to be a headless Service that selects it."""
    documents = _documents(render(job_of(recipe_file, nodes=3, gpus=8)).text)
    job, service = documents["Job"], documents["Service"]
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (3, 3, 60)
    pod = spec["template"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    command = [_expanded(word, {"JOB_COMPLETION_INDEX": "2"}) for word in _container(job)["command"]]
    port = service["spec"]["ports"][0]["port"]
    address = f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"
    expected = ["--nproc", "8", "--nnodes", "3", "--node-rank", "2", "--rendezvous", address]
    assert command[-8:] == expected


@pytest.mark.parametrize(
    ("code", "action"), [(75, "Ignore"), (2, "FailJob"), (3, "FailJob"), (4, "FailJob"), (1, "Count"), (137, "Count")]
)
def test_what_an_exit_code_means(recipe_file: Path, code: int, action: str) -> None:
    job = _documents(render(job_of(recipe_file)).text)["Job"]
    disruption, *rules = job["spec"]["podFailurePolicy"]["rules"]
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    matching = [rule["action"] for rule in rules if code in rule["onExitCodes"]["values"]]
    assert (matching or ["Count"])[0] == action
    assert {rule["onExitCodes"]["containerName"] for rule in rules} == {_container(job)["name"]}


def test_words_and_recipe_reach_the_command_as_they_are(recipe_file: Path, cluster: Cluster, tmp_path: Path) -> None:
    documents = _documents(render(job_of(recipe_file, *HOSTILE)).text)
    environment = {"HF_TOKEN": "a-secret", "HOME": "/root", "x": "y"}
    command = [_expanded(word, environment) for word in _container(documents["Job"])["command"]]
    subprocess.run(command, env=os.environ | {"PATH": cluster.path, "EXIT": "0"}, check=True)
    (arguments,) = cluster.arguments("gemma-tune")
    assert arguments[2:] == [*HOSTILE, "run.name=mine", "run.resume=auto"]
    (text,) = documents["ConfigMap"]["data"].values()
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert load_recipe(copy, arguments[2:]).recipe == load_recipe(recipe_file, arguments[2:]).recipe


def test_credentials_are_named_only(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    made = render(job_of(recipe_file), secret="keys")
    environment = {item["name"]: item for item in _container(_documents(made.text)["Job"])["env"]}
    reference = {"name": "keys", "key": "HF_TOKEN", "optional": True}
    assert environment["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}
    assert "hf_" not in made.text
    assert any("kubectl create secret generic keys --from-file=HF_TOKEN=FILE" in note for note in made.notes)


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        (["data.source=/home/me/rows.jsonl"], {}, r"would not see data\.source=/home/me/rows\.jsonl"),
        (["data.source=../rows.jsonl#5"], {}, r"data\.source=\.\./rows\.jsonl"),
        (["data.template=~/own.yaml"], {}, r"data\.template=~/own\.yaml"),
        (["run.output_dir=/scratch"], {}, r"run\.output_dir=/scratch"),
        (["model.name=/models/gemma"], {}, r"model\.name=/models/gemma"),
        ([], {"claim": "My Claim"}, r"--claim 'My Claim' is not a name of Kubernetes"),
        ([], {"namespace": "a.b"}, r"--namespace 'a\.b'"),
    ],
    ids=str,
)
def test_refusals(recipe_file: Path, overrides: list[str], options: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        render(job_of(recipe_file, *overrides), **options)


def test_rows_on_the_volume_are_told(recipe_file: Path) -> None:
    job = job_of(recipe_file, "data.source=/volume/big.jsonl", "data.eval_source=rows/*.csv", nodes=2)
    notes = " | ".join(render(job).notes)
    assert "has to lie on the volume of work, by the same name from its root: /volume/big.jsonl, rows/*.csv" in notes
    assert "ReadWriteMany" in notes
