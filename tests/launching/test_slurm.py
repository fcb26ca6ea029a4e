"""The batch script, run by bash on a cluster of fake programs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import Job, JobFile
from gemma_tune.launching.slurm import SlurmOptions, render_slurm
from tests.launching.fake_programs import Cluster
from tests.launching.jobs import HOSTILE, job_of

JOB = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NODELIST": "node-[a-b]"}
TWO = JOB | {"SLURM_NNODES": "2"}


def render(job: Job, **options: Any) -> JobFile:
    return render_slurm(job, SlurmOptions(**options))


def _directives(text: str) -> dict[str, str]:
    """As sbatch reads them: `#SBATCH` lines before the first command."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH ").partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def test_what_it_asks_for(recipe_file: Path) -> None:
    job = job_of(recipe_file, nodes=2, gpus=8, gpu_type="h100", cpus=64, memory_gib=512)
    made = render(job, partition="gpu", account="me", sbatch=("--qos=high", "--output=logs/%j"), time="1d12h30m")
    assert _directives(made.text) == {
        "--job-name": "mine", "--output": "logs/%j", "--nodes": "2", "--ntasks-per-node": "1", "--gres": "gpu:h100:8",
        "--cpus-per-task": "64", "--mem": "512G", "--time": "1-12:30:00", "--partition": "gpu", "--account": "me",
        "--signal": "B:TERM@180", "--requeue": "", "--open-mode": "append", "--qos": "high",
    }  # fmt: skip
    assert made.submit == ("sbatch",) and made.name == "mine.sbatch"
    assert "--gres" not in _directives(render(job_of(recipe_file, gpus=0)).text)


@pytest.mark.parametrize("machines", [{}, {"gpus": 4}, {"nodes": 2, "gpus": 8}], ids=str)
def test_words_reach_the_command_as_they_are(
    recipe_file: Path, cluster: Cluster, machines: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(recipe_file, *HOSTILE, **machines)
    text = render(job, before=("export RENDERED='a b'",)).text
    nodes = machines.get("nodes", 1)
    done = cluster.run(text, (TWO if nodes == 2 else JOB) | {"EXIT": "0,0", "HF_TOKEN": "secret-of-the-environment"})
    assert done.returncode == 0, done.stderr
    expected = ["train", "mine.yaml", *HOSTILE, "run.name=mine", "run.resume=auto"]
    if machines:
        expected += ["--nproc", str(machines["gpus"])]
    calls = sorted(cluster.calls("gemma-tune"), key=lambda call: str(call["SLURM_NODEID"]))
    if nodes == 2:
        expected += ["--nnodes", "2", "--rendezvous", "node-a:24321"]
        assert [call["arguments"] for call in calls] == [[*expected, "--node-rank", node] for node in ("0", "1")]
    else:
        assert [call["arguments"] for call in calls] == [expected]
    assert all(call["RENDERED"] == "a b" and call["HF_TOKEN"] == "secret-of-the-environment" for call in calls)
    assert not (cluster.folder / "hit").exists()


@pytest.mark.parametrize(
    ("exits", "code", "is_requeued"),
    [
        ("0", 0, False), ("75", 75, True), ("143", 143, True), ("1", 1, False), ("2", 2, False), ("3", 3, False),
        ("0,0", 0, False), ("75,75", 75, True), ("75@0.3,75", 75, True), ("143,143", 143, True), ("3,3", 3, False),
        ("0,3", 3, False),
        ("75,1@0.3", 75, True),  # all is saved, and the other node missed the first one
    ],
)  # fmt: skip
def test_only_an_interrupted_run_is_requeued(
    recipe_file: Path, cluster: Cluster, exits: str, code: int, is_requeued: bool
) -> None:
    nodes = len(exits.split(","))
    text = render(job_of(recipe_file, nodes=nodes)).text
    done = cluster.run(text, (TWO if nodes == 2 else JOB) | {"EXIT": exits})
    assert done.returncode == code, done.stderr
    assert (["requeue", "4321"] in cluster.arguments("scontrol")) == is_requeued


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SLURM_RESTART_COUNT": "3"}, "restarted 3 times already"),
        ({"STATE": "COMPLETING"}, ""),
        ({"STATE": "CANCELLED"}, ""),
    ],
    ids=str,
)
def test_it_stops_being_requeued(recipe_file: Path, cluster: Cluster, environment: dict[str, str], told: str) -> None:
    """After the allowed number of restarts; and when it was cancelled, or is requeued by SLURM itself."""
    text = render(job_of(recipe_file), restarts=3).text
    done = cluster.run(text, JOB | {"EXIT": "75"} | environment)
    assert done.returncode == 75 and told in done.stderr
    assert ["requeue", "4321"] not in cluster.arguments("scontrol")
    cluster.run(text, JOB | {"EXIT": "75", "SLURM_RESTART_COUNT": "2"})
    assert ["requeue", "4321"] in cluster.arguments("scontrol")


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_signal_before_the_time_limit_saves_and_requeues(recipe_file: Path, cluster: Cluster, nodes: int) -> None:
    """SLURM signals the script alone; each node's training has the time that it needs, also the slower one."""

    def signal_script(process: int) -> None:
        cluster.wait_for(*(f"ready-{node}" for node in range(nodes)))
        os.kill(process, signal.SIGTERM)

    text = render(job_of(recipe_file, nodes=nodes)).text
    environment = (TWO if nodes == 2 else JOB) | {"EXIT": "wait,wait"}
    done = cluster.run(text, environment, meanwhile=signal_script)
    assert done.returncode == 75, done.stderr
    assert cluster.arguments("scancel") == [["--signal=TERM", "4321"]]
    assert sorted(str(call["SLURM_NODEID"]) for call in cluster.calls("gemma-tune") if "stopped" in call) == [
        str(node) for node in range(nodes)
    ]
    assert ["requeue", "4321"] in cluster.arguments("scontrol")


def test_a_node_that_fails_ends_the_others(recipe_file: Path, cluster: Cluster) -> None:
    done = cluster.run(render(job_of(recipe_file, nodes=2)).text, TWO | {"EXIT": "wait,3"})
    assert done.returncode != 75
    assert ["requeue", "4321"] not in cluster.arguments("scontrol")


def test_srun_gets_the_cores(recipe_file: Path, cluster: Cluster) -> None:
    cluster.run(render(job_of(recipe_file, cpus=12)).text, JOB | {"EXIT": "0"})
    assert cluster.arguments("srun")[0][:2] == ["--ntasks=1", "--cpus-per-task=12"]


def test_bash_takes_it(recipe_file: Path) -> None:
    for nodes in (1, 2):
        text = render(job_of(recipe_file, *HOSTILE, nodes=nodes)).text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sbatch": ("--nodes=4",)}, r"the script relies on its own"),
        ({"sbatch": ("qos=high",)}, r"not an option of sbatch"),
        ({"sbatch": ("--qos=a\n#SBATCH --nodes=9",)}, r"not an option of sbatch"),
        ({"partition": "a b"}, r"--partition 'a b' holds a blank"),
        ({"account": "$(id)"}, r"--account '\$\(id\)' holds"),
        ({"time": "2m", "grace": 180}, r"--time is 120 s, and the training is told to save 180 s before"),
        ({"time": "12:00:00"}, r"--time '12:00:00' is not a length of time"),
    ],
    ids=str,
)
def test_refusals(recipe_file: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        render(job_of(recipe_file), **options)


def test_notes(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    notes = " | ".join(render(job_of(recipe_file, f"data.eval_source={tmp_path}/my rows.jsonl")).notes)
    assert "training.save_every_minutes=15" in notes
    assert "runs/mine is there already" in notes
    assert f"data.eval_source ({tmp_path}/my rows.jsonl)" in notes
    bounded = job_of(recipe_file, "training.save_every_minutes=10", "training.max_minutes=60", "run.name=other")
    notes = " | ".join(render(bounded).notes)
    assert "save_every" not in notes and "already" not in notes and "training.max_minutes=60 ends an attempt" in notes
