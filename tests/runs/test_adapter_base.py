"""Where a base meets an adapter: which files are its base, wherever they lie and whoever asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import ExportError, GemmaTuneError, ModelError
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.models.safetensors import file_hashes
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.runs.adapter_base import find_base, read_trained_on, require_base, write_base_record
from gemma_tune.runs.adapter_dir import AdapterDir
from tests.runs.test_lock import LOCK

MODULE = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base next to where the commands are typed, named by a relative path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_MODEL_DIR, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(base: Path) -> Path:
    """The smallest run that was trained on it."""
    run = base.parent / "runs" / "r"
    write_adapter(run / "adapter")
    write_base_record(run / "adapter", fetch_model("base"))
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    record = {"name": "base", "revision": None, "files": file_hashes(base), "directory": str(base)}
    (run / "lock.json").write_text(json.dumps({**LOCK, "base": record}), encoding="utf-8")
    return run


def write_adapter(directory: Path, **config: Any) -> None:
    directory.mkdir(parents=True)
    rows = load_file(TINY_MODEL_DIR / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape
    tensors = {MODULE.format(layer, "A"): torch.ones(2, rows[1]) for layer in range(4)}
    tensors |= {MODULE.format(layer, "B"): torch.ones(rows[0], 2) for layer in range(4)}
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    text = json.dumps({**settings, "base_model_name_or_path": "base", **config})
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def change_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("asked", ["runs/r/adapter", "copy", "link"])
@pytest.mark.parametrize("folder", [".", "runs", "elsewhere/deep"])
def test_a_relative_base_is_found_from_anywhere(run: Path, base: Path, folder: str, asked: str) -> None:
    shutil.copytree(run / "adapter", base.parent / "copy")
    (base.parent / "elsewhere" / "deep").mkdir(parents=True)
    (base.parent / "elsewhere" / "link").symlink_to(run / "adapter")
    path = base.parent / ("elsewhere/link" if asked == "link" else asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base.parent / folder)
        found = find_base(AdapterDir(path))
    assert found.model.directory == base.resolve() and found.note is None
    assert (found.model.name, found.files) == ("base", file_hashes(base))


def test_another_base_is_refused_and_an_equal_copy_elsewhere_is_taken(run: Path, base: Path) -> None:
    adapter = AdapterDir(run / "adapter", ModelError)
    shutil.copytree(base, base.parent / "equal")
    change_weights(base)
    for asked in (None, "base"):
        with pytest.raises(ModelError, match=r"not the base that .* these files differ: model\.safetensors"):
            find_base(adapter, named=asked)
    assert find_base(adapter, named="equal").note is None
    with pytest.raises(ModelError, match=r"these files differ"):
        require_base(adapter, fetch_model("base"))
    assert require_base(adapter, fetch_model("equal")) is None
    (run.parent / "base").symlink_to(base.parent / "equal")  # nearer to the adapter than the changed one, and after it
    assert find_base(adapter).model.directory == (base.parent / "equal").resolve()


def test_a_damaged_directory_of_the_name_does_not_hide_an_equal_one(run: Path, base: Path) -> None:
    shutil.copytree(base, run / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert find_base(AdapterDir(run / "adapter")).model.directory == run / "base"
    shutil.rmtree(run / "base")
    with pytest.raises(GemmaTuneError, match=r"model\.safetensors: cut off"):
        find_base(AdapterDir(run / "adapter"))
    shutil.rmtree(base)
    with pytest.raises(ExportError, match=r"the base base of .* is not here"):
        find_base(AdapterDir(run / "adapter"))


def test_a_moved_base_lies_where_the_training_was(
    run: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "r"
    shutil.copytree(run, other)
    assert find_base(AdapterDir(other / "adapter")).model.directory == base.resolve()  # by the lock
    away = base.rename(base.parent / "away")
    with pytest.raises(ExportError, match="is not here"):
        find_base(AdapterDir(other / "adapter"))
    assert find_base(AdapterDir(other / "adapter"), named=str(away)).note is None


def test_what_nobody_recorded_is_said(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "foreign")
    found = find_base(AdapterDir(tmp_path / "foreign"))
    assert found.note is not None and "nobody recorded the weights" in found.note
    with pytest.raises(ExportError, match="does not name its base"):
        write_adapter(tmp_path / "nameless", base_model_name_or_path=None)
        find_base(AdapterDir(tmp_path / "nameless"))


def test_a_record_in_fewer_bits_is_met_by_the_base_in_16(run: Path, base: Path) -> None:
    record = json.loads((run / "adapter" / "base.json").read_text(encoding="utf-8"))
    record["base"] |= {"quantized": True, "files": {"model.safetensors": "0" * 64}}
    (run / "adapter" / "base.json").write_text(json.dumps(record), encoding="utf-8")
    note = find_base(AdapterDir(run / "adapter"), named="base").note
    assert note is not None and "in fewer bits" in note


@pytest.mark.parametrize(
    "record", [[], {"base": []}, {"base": {"files": [1]}}, {"base": {"files": {"a": 1}}}, {"base": {"name": 5}}]
)
def test_a_record_of_another_kind_is_damaged(run: Path, record: Any) -> None:
    (run / "adapter" / "base.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match=r"base\.json is damaged"):
        read_trained_on(AdapterDir(run / "adapter", ModelError))


def test_a_lost_lock_is_needed_only_where_nothing_lies_next_to_the_adapter(run: Path) -> None:
    adapter = AdapterDir(run / "adapter")
    (run / "lock.json").write_text("{", encoding="utf-8")
    assert find_base(adapter).note is None
    (run / "adapter" / "base.json").unlink()
    with pytest.raises(GemmaTuneError, match=r"lock\.json is damaged"):
        find_base(adapter)


def test_folders_that_are_no_run_are_not_asked(base: Path, tmp_path: Path) -> None:
    # A web page's manifest.json next to somebody's lock.json, above an adapter in a folder of another name.
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    (tmp_path / "lock.json").write_text("no lock of ours", encoding="utf-8")
    write_adapter(tmp_path / "mine")
    assert find_base(AdapterDir(tmp_path / "mine")).model.directory == base.resolve()


def test_the_base_alone_is_compared_where_the_adapter_is_damaged(run: Path, base: Path) -> None:
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert find_base(AdapterDir(run / "adapter"), with_adapter=False).model.directory == base.resolve()
    change_weights(base)
    with pytest.raises(ExportError, match="these files differ"):
        find_base(AdapterDir(run / "adapter"), with_adapter=False)


def test_files_next_to_an_adapter_are_those_that_were_written(run: Path, base: Path) -> None:
    adapter = run / "adapter"
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(base / name, adapter / name)
    model: LocalModel = fetch_model("base")
    write_base_record(adapter, model)
    find_base(AdapterDir(adapter))
    text = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    text["base_model_name_or_path"] = "./base"  # the one thing that a user is told to change
    (adapter / "adapter_config.json").write_text(json.dumps(text), encoding="utf-8")
    find_base(AdapterDir(adapter))
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match=r"chat_template\.jinja \(missing\) changed, by what base\.json says"):
        find_base(AdapterDir(adapter))
