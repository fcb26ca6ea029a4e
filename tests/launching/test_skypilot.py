"""The SkyPilot file, read by PyYAML; its commands, run by bash on a machine of fake programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import Job, JobFile
from gemma_tune.launching.skypilot import SkypilotOptions, render_skypilot
from tests.launching.fake_programs import Cluster
from tests.launching.jobs import HOSTILE, job_of

IMAGE = {"bucket": "my-runs", "image": "reg.example/gemma:1"}
MACHINE = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}


def render(job: Job, **options: Any) -> JobFile:
    return render_skypilot(job, SkypilotOptions(**options))


@pytest.fixture
def wheel(recipe_file: Path, tmp_path: Path) -> str:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "gemma_tune-1-py3-none-any.whl").touch()
    return "dist/gemma_tune-1-py3-none-any.whl"


def _task(text: str) -> dict[str, Any]:
    task = yaml.safe_load(text)
    assert isinstance(task, dict)
    return task


def test_what_it_asks_for(wheel: str, recipe_file: Path) -> None:
    job = job_of(recipe_file, HOSTILE[1], nodes=2, gpus=8, gpu_type="H100", cpus=64, memory_gib=512)
    made = render(job, bucket="s3://my-runs", install=f"{wheel}[unsloth]", cloud="gcp/us-central1", spot=True)
    task = _task(made.text)
    assert task["resources"] == {
        "infra": "gcp/us-central1",
        "accelerators": "H100:8",
        "cpus": "64+",
        "memory": "512+",
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }
    assert task["num_nodes"] == 2
    assert task["file_mounts"] == {
        "~/sky_workdir/mine.yaml": "mine.yaml",
        "~/sky_workdir/my rows.jsonl": "my rows.jsonl",
        f"~/sky_workdir/{wheel}": wheel,
        "/gemma-tune-runs": {"source": "s3://my-runs", "mode": "MOUNT_CACHED"},
    }
    assert task["secrets"] == {"HF_TOKEN": None}  # gemma-7b is gated
    assert made.submit == ("sky", "jobs", "launch", "--secret", "HF_TOKEN")
    assert any("uploads mine.yaml, my rows.jsonl" in note for note in made.notes)


def test_an_image_and_a_new_bucket(recipe_file: Path) -> None:
    made = render(job_of(Path("quickstart"), gpus=0), **IMAGE)
    task = _task(made.text)
    assert task["resources"]["image_id"] == "docker:reg.example/gemma:1"
    assert task["file_mounts"] == {"/gemma-tune-runs": {"name": "my-runs", "mode": "MOUNT_CACHED"}}
    assert "setup" not in task and "secrets" not in task
    assert made.submit == ("sky", "jobs", "launch")


@pytest.mark.parametrize("nodes", [1, 2])
def test_words_reach_the_command_as_they_are(recipe_file: Path, cluster: Cluster, nodes: int) -> None:
    job = job_of(recipe_file, *HOSTILE, nodes=nodes, gpus=8, gpu_type="H100")
    task = _task(render(job, **IMAGE, before=("export RENDERED='a b'",)).text)
    cluster.add("sleep")
    done = cluster.run(task["run"], MACHINE | {"EXIT": "75,75", "HF_TOKEN": "secret-of-the-environment"})
    assert done.returncode == 75, done.stderr
    expected = ["train", "mine.yaml", *HOSTILE, "run.name=mine", "run.resume=auto", "run.output_dir=/gemma-tune-runs"]
    expected += ["--nproc", "8"]
    if nodes == 2:
        expected += ["--nnodes", "2", "--node-rank", "1", "--rendezvous", "10.0.0.1:29500"]
    (call,) = cluster.calls("gemma-tune")
    assert call["arguments"] == expected and call["RENDERED"] == "a b"
    assert cluster.arguments("sleep") == ([["60"]] if nodes == 2 else [])  # machine 1 waits for what 0 saves
    assert not (cluster.folder / "hit").exists()


def test_setup_installs_what_was_named_into_what_runs(wheel: str, recipe_file: Path, cluster: Cluster) -> None:
    cluster.add("uv")
    job = job_of(recipe_file, gpu_type="L4")
    task = _task(render(job, bucket="runs", install=f"{wheel}[unsloth]").text)
    done = cluster.run(task["setup"], {})
    assert done.returncode == 0, done.stderr
    environment = f"{cluster.folder}/gemma-tune-env"
    install = ["pip", "install", "--python", f"{environment}/bin/python", f"./{wheel}[unsloth]"]
    assert cluster.arguments("uv") == [["venv", "--allow-existing", "--python", "3.12", environment], install]
    assert cluster.run(task["setup"], {"EXIT": "1"}).returncode == 1
    (cluster.folder / "gemma-tune-env" / "bin").mkdir(parents=True)
    (cluster.folder / "bin" / "gemma-tune").rename(cluster.folder / "gemma-tune-env" / "bin" / "gemma-tune")
    assert cluster.run(task["run"], {"EXIT": "0"}).returncode == 0


def test_a_requirement_goes_to_pip_as_it_is(recipe_file: Path) -> None:
    job = job_of(recipe_file, gpu_type="L4")
    task = _task(render(job, bucket="runs", install="git+https://git.example/gemma-tune@v1; x").text)
    assert "'git+https://git.example/gemma-tune@v1; x'" in task["setup"]


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        ([], {"image": None}, r"needs --install or --image"),
        ([], {"install": "gemma-tune"}, r"and not both"),
        ([], {"install": ".", "image": None}, r"--install \. is a directory"),
        ([], {"install": "no.whl", "image": None}, r"no such file, and it has to be uploaded: --install \(no\.whl\)"),
        (["data.source=/home/me/rows.jsonl"], {}, r"outside of this directory.*data\.source \(/home/me/rows\.jsonl\)"),
        (["data.source=*.jsonl"], {}, r"this whole directory would be uploaded for data\.source"),
        (["data.source=gone/*.jsonl"], {}, r"no such file.*data\.source \(gone/\*\.jsonl\)"),
    ],
    ids=str,
)
def test_refusals(recipe_file: Path, overrides: list[str], options: dict[str, Any], told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        render(job_of(recipe_file, *overrides, gpu_type="L4"), **{**IMAGE, **options})


def test_a_card_has_to_be_named(recipe_file: Path) -> None:
    with pytest.raises(LaunchError, match=r"needs --gpu-type"):
        render(job_of(recipe_file), **IMAGE)


def test_a_recipe_elsewhere(recipe_file: Path, tmp_path: Path) -> None:
    absolute = tmp_path / recipe_file
    with pytest.raises(LaunchError, match=rf"the recipe \({absolute}\)"):
        render(job_of(absolute, gpu_type="L4"), **IMAGE)
