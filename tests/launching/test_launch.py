"""Options by scheduler, files that are never replaced, credentials, and the program that submits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import LaunchError, RecipeError
from gemma_tune.launching.job import JobFile, Resources
from gemma_tune.launching.launch import SCHEDULERS, make_job_file, require_program, submit_job, write_job
from gemma_tune.recipe.load import load_recipe
from tests.launching.fake_programs import Cluster
from tests.made_secrets import SECRETS, telling_part

NEEDED: dict[str, dict[str, Any]] = {
    "slurm": {},
    "kubernetes": {"image": "another", "claim": "another"},
    "skypilot": {"bucket": "another", "image": "another"},
}
ALL = {
    "time": "12h", "grace": 90, "restarts": 0, "before": ("true",), "partition": "p", "account": "a",
    "sbatch": ("--qos=high",), "image": "i", "claim": "work", "namespace": "ml", "secret": "keys", "bucket": "runs",
    "install": "gemma-tune", "cloud": "aws", "spot": True,
}  # fmt: skip


def _make(on: str, *overrides: str, **options: Any) -> JobFile:
    resources = Resources(gpu_type="L4")
    return make_job_file(load_recipe(Path("quickstart"), overrides), on, resources, {**NEEDED[on], **options})


def test_every_option_has_an_owner() -> None:
    assert {name for each in SCHEDULERS.values() for name in each.option_names} == set(ALL)


@pytest.mark.parametrize("on", SCHEDULERS)
@pytest.mark.parametrize("option", ALL)
def test_an_option_of_another_scheduler_is_refused(on: str, option: str) -> None:
    options = {option: ALL[option]} | ({"image": None} if (on, option) == ("skypilot", "install") else {})
    if option in SCHEDULERS[on].option_names:
        assert _make(on, **options).text != _make(on).text
    else:
        with pytest.raises(LaunchError, match=rf"--{option} is not an option of {on}; it belongs to "):
            _make(on, **options)


@pytest.mark.parametrize(("on", "missing"), [("kubernetes", "--image and --claim"), ("skypilot", "--bucket")])
def test_what_a_scheduler_needs(on: str, missing: str) -> None:
    with pytest.raises(LaunchError, match=rf"--on {on} needs {missing}"):
        make_job_file(load_recipe(Path("quickstart")), on, Resources(), {})


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("on", SCHEDULERS)
def test_no_kind_of_credential_gets_into_a_job_file(on: str, secret: str) -> None:
    with pytest.raises(LaunchError, match=r"the job file would hold a credential") as refused:
        _make(on, f"data.columns={{a: '{secret}'}}")
    assert telling_part(secret) not in refused.value.message + str(refused.value.hint)


@pytest.mark.parametrize("on", SCHEDULERS)
def test_a_credential_is_refused_wherever_it_stands(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = r"the job file would hold a credential"
    with pytest.raises(LaunchError, match=told) as refused:
        _make(on, f"data.columns={{a: hf_{'a' * 34}}}")
    assert "hf_" not in refused.value.message + str(refused.value.hint)
    monkeypatch.setenv("HF_TOKEN", "not-by-its-prefix-0123")
    assert "not-by-its-prefix" not in _make(on).text
    with pytest.raises(LaunchError, match=told):
        _make(on, "data.columns={a: not-by-its-prefix-0123}")


def test_another_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "job"
    write_job(path, "a é\n")
    write_job(path, "a é\n")
    with pytest.raises(RecipeError, match=r"exists already, and is not overwritten"):
        write_job(path, "b\n")
    assert path.read_text(encoding="utf-8") == "a é\n"


def test_submitting(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    monkeypatch.setenv("SAYS", "Submitted batch job 7")
    job_file = _make("slurm")
    with pytest.raises(LaunchError, match=r"sbatch is not on the PATH"):
        require_program(job_file)
    cluster.add("sbatch", "kubectl", "sky")
    for on, arguments in {"slurm": [], "kubernetes": ["apply", "-f"], "skypilot": ["jobs", "launch"]}.items():
        job_file = _make(on)
        require_program(job_file)
        assert submit_job(Path("my; job"), job_file, capture=True) == "Submitted batch job 7\n"
        assert cluster.arguments(job_file.submit[0]) == [[*arguments, "my; job"]]
    assert submit_job(Path("job"), job_file, capture=False) is None
    assert capfd.readouterr().out == "Submitted batch job 7\n"
    monkeypatch.setenv("EXIT", "5")
    with pytest.raises(LaunchError, match=r"sky did not take the job \(exit code 5\)") as refused:
        submit_job(Path("my job"), job_file, capture=True)
    assert refused.value.hint is not None and refused.value.hint.endswith("sky jobs launch 'my job'")
