"""What a job runs, before it is written for a scheduler."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import local_paths, parse_time, require_word, shell_lines
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import RUN_NAME_PATTERN
from tests.launching.jobs import HOSTILE, job_of


@pytest.mark.parametrize(
    ("file", "overrides", "name"),
    [
        ("mine.yaml", [], "mine"),
        ("mine.yaml", ["run.name=First_Run"], "First_Run"),
        ("my recipe (2).yaml", [], "my-recipe--2-"),
        (".é.yaml", [], "run"),
        ("a" * 90 + ".yaml", [], "a" * 64),
    ],
)
def test_the_run_has_a_fixed_name_and_goes_on(recipe_file: Path, file: str, overrides: list[str], name: str) -> None:
    path = recipe_file.rename(file)
    job = job_of(path, *overrides, "run.resume=never", "lora.rank=8")
    assert job.command("R") == ["gemma-tune", "train", "R", "lora.rank=8", f"run.name={name}", "run.resume=auto"]
    assert re.fullmatch(RUN_NAME_PATTERN, name)
    assert load_recipe(path, job.overrides).recipe.run.name == name


def test_processes(recipe_file: Path) -> None:
    assert "--nproc" not in job_of(recipe_file, gpus=0).command("R")
    assert job_of(recipe_file, gpus=4).command("R")[-2:] == ["--nproc", "4"]
    assert job_of(recipe_file, gpus=1, nodes=2).command("R")[-4:] == ["--nproc", "1", "--nnodes", "2"]
    assert job_of(recipe_file, gpus=0, nodes=2).command("R")[-4:] == ["--nproc", "1", "--nnodes", "2"]


@settings(deadline=None)  # loads a recipe for each name
@given(st.sets(st.from_regex(RUN_NAME_PATTERN, fullmatch=True), min_size=2, max_size=6))
def test_labels_are_names_of_kubernetes_and_differ(names: set[str]) -> None:
    labels = {job_of(Path("quickstart"), f"run.name='{name.strip()}'").label for name in names}
    assert len(labels) == len({name.strip() for name in names})
    # With -N behind it a label is the host name of a pod (RFC 1123), and it begins with a letter as a Service's does.
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,48}[a-z0-9]", label) for label in labels)


def test_similar_names_have_other_labels() -> None:
    names = ("run-a", "Run-A", "run.a", "run_a", "run-a-", "x" * 60, "x" * 61)
    assert len({job_of(Path("quickstart"), f"run.name={name}").label for name in names}) == len(names)


def test_shipped_recipes_go_by_name(recipe_file: Path) -> None:
    shipped, own = job_of(Path("quickstart")), job_of(recipe_file)
    assert (shipped.is_shipped, shipped.recipe_argument) == (True, "quickstart")
    assert (own.is_shipped, own.recipe_argument) == (False, "mine.yaml")


@pytest.mark.parametrize(
    ("overrides", "secrets"),
    [
        (["model.name=gemma-7b"], ("HF_TOKEN",)),
        (["model.name=gemma-tiny"], ()),
        (["model.name=someone/private"], ("HF_TOKEN",)),
        (["model.name=gemma-tiny", "logging.trackers=[wandb]"], ("WANDB_API_KEY",)),
    ],
    ids=str,
)
def test_credentials_that_a_run_may_need(recipe_file: Path, overrides: list[str], secrets: tuple[str, ...]) -> None:
    assert job_of(recipe_file, *overrides).secrets == secrets


def test_local_paths(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "gemma").mkdir(parents=True)
    job = job_of(
        recipe_file, "data.source=null",
        "data.mix=[{source: 'my rows.jsonl#5'}, {source: owner/name, template: own.yaml}]",
        "data.eval_source=rows/**/part-*.csv", "model.name=models/gemma", "model.adapter=runs/first",
    )  # fmt: skip
    assert [(each.setting, each.path, each.mounted) for each in local_paths(job.recipe)] == [
        ("data.eval_source", "rows/**/part-*.csv", "rows"),
        ("data.mix.0.source", "my rows.jsonl", "my rows.jsonl"),
        ("data.mix.1.template", "own.yaml", "own.yaml"),
        ("model.name", "models/gemma", "models/gemma"),
        ("model.adapter", "runs/first", "runs/first"),
    ]
    assert local_paths(job_of(recipe_file).recipe) == []


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("12h", 43_200), ("1d12h30m", 131_400), ("2d", 172_800)])
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "12", "12:00:00", "1.5h", "h", "1h2d", "-1h", "1h "])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(LaunchError, match=r"is not a length of time"):
        parse_time(text)


@pytest.mark.parametrize("value", ["a b", "a\nb", "'a", "$(a)", "`a`", "#a", "a\\", ""])
def test_what_is_no_word(value: str) -> None:
    with pytest.raises(LaunchError, match=r"--partition "):
        require_word("--partition", value)


def test_shell_lines_are_the_words() -> None:
    words = ["gemma-tune", "train", "my recipe.yaml", *HOSTILE, "--nproc", "8", "--nnodes", "2"]
    lines = shell_lines(words)
    assert lines[-2:] == ["--nproc 8", "--nnodes 2"] and len(lines) == 1 + len(HOSTILE) + 2
    assert shlex.split(" ".join(lines)) == words
    script = "printf '%s\\0' " + " \\\n  ".join(lines)
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.split("\0")[:-1] == words
