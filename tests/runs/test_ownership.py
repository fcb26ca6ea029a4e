"""Only what gemma-tune made is written, replaced or removed; a damaged or killed run never blocks its command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from gemma_tune.data.encode import cache
from gemma_tune.disk import output_directory, output_file, shared_directory
from gemma_tune.errors import ExportError, GemmaTuneError, RunError
from gemma_tune.runs.checkpoints import has_checkpoints
from gemma_tune.runs.index import describe_state
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest, start_manifest, update_manifest
from gemma_tune.runs.open_run import create_run, discard_run, discarding_when_refused

FIRST = ("recipe.yaml", "template.yaml", "resolved.yaml", "library.log", "notes.tmp", ".made.json.bak", "adapter")


def tree(folder: Path) -> dict[str, str]:
    """Path -> kind, target or hash of everything below a folder."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}"
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def create(output_dir: Path, name: str | None = "mine") -> RunDir:
    return create_run(output_dir, name=name, recipe_name="r", needed_bytes=0)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("kind", ["folder", "link", "broken link", "file", "partial", "scratch", "cache"])
def test_what_the_user_has_is_as_before(tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """49 refused commands and one hash of everything each."""
    users = tmp_path / "users"
    users.mkdir()
    (users / name).write_text("three hours of work", encoding="utf-8")
    places = {"partial": ".mine.partial", "scratch": ".parts", "cache": "cache/tokens/entry"}
    place = tmp_path / places.get(kind, "mine")
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        place.write_text("x", encoding="utf-8")
    elif "link" in kind:
        place.symlink_to(tmp_path / "nowhere" if "broken" in kind else users)
    else:
        (users / name).rename(place.parent / "moved")
        place.mkdir()
        (place.parent / "moved").rename(place / name)
    before = tree(tmp_path)
    if kind == "cache":
        monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
        assert cache.clear_cache() == (0, 0)
    elif kind == "partial":
        for opened in (output_directory, output_file):
            with pytest.raises(ExportError, match="did not make"), opened(tmp_path / "mine"):
                pass
    elif kind == "scratch":
        with pytest.raises(ExportError, match="did not make"), shared_directory(place):
            pass
    else:
        with pytest.raises(RunError, match="exists already"):
            create(tmp_path)
    assert tree(tmp_path) == before


def test_an_empty_folder_is_used_and_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run = create(tmp_path)
    run.recipe.write_text("x", encoding="utf-8")
    with pytest.raises(GemmaTuneError), discarding_when_refused(run):
        start_manifest(run)
        raise GemmaTuneError("the rows are too long")
    assert tree(tmp_path) == {"mine": "folder"}


def test_a_run_that_was_killed_in_its_first_files_is_taken_again(tmp_path: Path) -> None:
    run = create(tmp_path / "runs")
    run.recipe.write_text("half", encoding="utf-8")
    (run.path / ".resolved.yaml.77.tmp").write_text("", encoding="utf-8")
    assert create(tmp_path / "runs") == run
    assert discard_run(run) and tree(tmp_path) == {}
    (tmp_path / "runs").mkdir()  # the user's own, and empty
    assert discard_run(create(tmp_path / "runs", None)) and tree(tmp_path) == {"runs": "folder"}


def test_a_crash_after_a_run_was_ready_is_recorded(tmp_path: Path) -> None:
    run = create(tmp_path)
    with discarding_when_refused(run):
        start_manifest(run)
    assert not run.made.exists() and describe_state(run).error == "its process is gone"
    with pytest.raises(ValueError, match="seed"), discarding_when_refused(run):
        update_manifest(run, status="running")
        raise ValueError("seed")
    assert (read_manifest(run).status, read_manifest(run).error) == ("failed", "ValueError: seed")
    assert not discard_run(run) and run.manifest.is_file()


def test_two_that_share_a_scratch_directory(tmp_path: Path) -> None:
    scratch, output = tmp_path / "out" / ".parts", tmp_path / "out" / "gguf"
    output.mkdir(parents=True)
    for name in ("export.json", ".export.json.77.tmp", "model.gguf"):
        (output / name).write_text("x", encoding="utf-8")
    with shared_directory(scratch, sweeps=[output]):
        (scratch / "part").mkdir()
        with shared_directory(scratch, sweeps=[output]):
            pass
        assert (scratch / "part").is_dir() and (output / ".export.json.77.tmp").is_file()
    assert sorted(tree(tmp_path / "out")) == ["gguf", "gguf/export.json", "gguf/model.gguf"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "", '{"status": "paused", "started": "x", "updated": "x"}', '{"status": null}']
)
def test_a_damaged_manifest_is_a_sentence(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path)
    run.manifest.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        read_manifest(run)


def test_fields_of_a_later_version_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    start_manifest(run)
    run.manifest.write_text(json.dumps({**json.loads(run.manifest.read_text()), "gpu_hours": 1}), encoding="utf-8")
    update_manifest(run, step=3)
    assert json.loads(run.manifest.read_text())["gpu_hours"] == 1 and read_manifest(run).step == 3


def test_a_first_checkpoint_without_its_seal_counts_as_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    assert not has_checkpoints(run)
    (run.checkpoints / "checkpoint-1" / "complete.json").write_text("{", encoding="utf-8")
    assert has_checkpoints(run)
