"""Every name or path becomes something to load, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gemma_tune.errors import ModelError, RunError
from gemma_tune.models.catalogue import MODELS, TINY, find_model
from gemma_tune.models.directory import check_directory
from gemma_tune.models.resolve import refuse_other, resolve, resolve_model
from gemma_tune.paths import TINY_MODEL_DIR

CONFIG = {
    "model_type": "gemma",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete model directory of one weight file."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    write_json(path / "tokenizer.json", {})
    write_json(path / "tokenizer_config.json", {"bos_token": "<bos>"})
    safetensors.torch.save_file({"w": torch.zeros(4, 4)}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def split_weights(directory: Path, entries: dict[str, str]) -> None:
    (directory / "model.safetensors").unlink()
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": entries})


def error_of(name: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(name))
    assert caught.value.exit_code == 2
    return caught.value


def test_unknown_name_gets_the_nearest_and_the_command() -> None:
    with pytest.raises(ModelError) as caught:
        find_model("gema-7b")
    assert "'gema-7b'" in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean 'gemma-7b'? ") and "gemma-tune models list" in caught.value.hint
    assert error_of("gema-7b").message == caught.value.message


@pytest.mark.parametrize(
    "name", ["", " ", "gemma 7b", "google/", "a/b c", "-x/y", "x/y-", "x/..y", "a" * 60 + "/" + "b" * 60]
)
def test_names_that_are_nothing_are_refused(name: str) -> None:
    error_of(name)


@pytest.mark.parametrize("name", ["someone/my-gemma", "owner_1/Model.v2-it", "google/gemma-9-1b"])
def test_other_hub_ids_are_left_to_the_check_after_download(name: str) -> None:
    source = resolve_model(name)
    assert (source.kind, source.location, source.model, source.config) == ("hub", name, None, None)


def test_registry_names_give_the_repository_that_was_asked_for() -> None:
    source = resolve_model("Gemma-7B")
    assert (source.kind, source.location) == ("catalogue", "google/gemma-7b")
    assert source.model is MODELS["gemma-7b"] and source.config == MODELS["gemma-7b"].config
    assert resolve_model("Unsloth/gemma-7b-BNB-4bit").location == "unsloth/gemma-7b-bnb-4bit"
    assert resolve_model("google/gemma-3-1b-pt").model is MODELS["gemma-3-1b"]
    assert resolve_model("gemma-3-1b-pt").location == "google/gemma-3-1b-pt"


def test_gemma_tiny_is_read_from_its_own_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_tune.models.catalogue.TINY_MODEL_DIR", directory)
    source = resolve_model(TINY)
    assert (source.kind, source.location) == ("catalogue", str(directory))
    assert source.config is not None and source.config.num_layers == 2
    write_json(directory / "config.json", CONFIG | {"num_hidden_layers": 3})
    assert MODELS[TINY].config.num_layers == 3


def test_the_shipped_gemma_tiny_is_a_gemma_of_multi_query_attention() -> None:
    config = MODELS[TINY].config
    assert (config.model_type, config.hidden_size, config.head_dim) == ("gemma", 256, 64)
    assert (config.num_heads, config.num_kv_heads, config.has_tied_embeddings) == (4, 1, True)
    assert resolve_model(str(TINY_MODEL_DIR)).config == config


def test_a_directory_resolves(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(directory))
    assert (source.kind, source.location, source.model) == ("model", str(directory.resolve()), None)
    assert source.config is not None and source.config.hidden_size == 16
    monkeypatch.chdir(directory.parent)
    assert resolve_model("model").location == source.location
    assert resolve_model("./model/").location == source.location


def test_a_short_name_is_not_shadowed_by_a_directory_but_a_path_is_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """from_pretrained("google/gemma-2b") takes a directory of that name, so ours has to check that directory."""
    monkeypatch.chdir(directory.parent)
    directory.rename(directory.parent / "gemma-2b")
    assert resolve_model("gemma-2b").kind == "catalogue"
    assert resolve_model("./gemma-2b").kind == "model"
    (directory.parent / "google").mkdir()
    (directory.parent / "gemma-2b").rename(directory.parent / "google" / "gemma-2b")
    assert resolve_model("google/gemma-2b").kind == "model"


@pytest.mark.parametrize("name", ["./none", "../none", "/none/at/all", "~/none-at-all", "a/b/c", "models/", r"a\b"])
def test_a_path_that_is_not_there_says_so(name: str) -> None:
    assert error_of(name).message == f"{name}: no such directory"


def test_a_name_that_the_file_system_refuses_is_an_error_of_ours() -> None:
    assert "cannot be read" in error_of("./" + "x" * 5000).message


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    error = error_of(path)
    assert "is a GGUF file" in error.message
    assert error.hint is not None and "cannot be trained" in error.hint
    path.rename(tmp_path / "model.txt")
    assert "is a file" in error_of(tmp_path / "model.txt").message


def test_a_directory_of_another_model_is_refused_by_name(directory: Path) -> None:
    write_json(directory / "config.json", CONFIG | {"model_type": "llama"})
    assert "'llama'" in error_of(directory).message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_model_code_is_refused_in_every_config(directory: Path, name: str) -> None:
    write_json(directory / name, CONFIG | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    error = error_of(directory)
    assert name in error.message and "auto_map" in error.message


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_missing_file_is_named(directory: Path, missing: str, said: str) -> None:
    (directory / missing).unlink()
    assert said in error_of(directory).message


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickle" in error_of(directory).message


@pytest.mark.parametrize(
    "entry", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", ".h"]
)
def test_index_entries_must_be_plain_names(directory: Path, entry: str) -> None:
    split_weights(directory, {"w": entry})
    assert "not a plain" in error_of(directory).message


def test_shards_must_be_there_and_whole(directory: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    split_weights(directory, {"w": shard, "v": "model-00002-of-00002.safetensors"})
    safetensors.torch.save_file({"w": torch.zeros(4)}, directory / shard)
    assert "missing: model-00002-of-00002.safetensors" in error_of(directory).message
    safetensors.torch.save_file({"v": torch.zeros(4)}, directory / "model-00002-of-00002.safetensors")
    assert resolve_model(str(directory)).kind == "model"


@pytest.mark.parametrize("num_bytes", [0, 5, 40, -1])
def test_a_cut_off_weight_file_is_found(directory: Path, num_bytes: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert "cut off" in error_of(directory).message


def test_a_git_lfs_pointer_is_found(directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (directory / "model.safetensors").write_text(pointer, encoding="utf-8")
    assert "Git LFS pointer" in error_of(directory).message


def test_weights_behind_links_are_accepted(directory: Path) -> None:
    """The hub's cache holds links to blobs that lie outside of the snapshot."""
    blob = directory.parent / "blob"
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to(blob)
    assert resolve_model(str(directory)).kind == "model"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run looks like from outside, with two exports."""
    path = tmp_path / "run"
    for file in ("manifest.json", "adapter/adapter_config.json", "export/adapter/adapter_config.json",
                 "export/gguf/export.json", "export/adapter/export.json"):  # fmt: skip
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        write_json(path / file, {"base_model_name_or_path": "google/gemma-7b"})
    (path / "export" / "gguf" / "model.gguf").write_bytes(b"GGUF")
    return path


def test_an_adapter_names_its_base_and_the_commands(run: Path) -> None:
    error = error_of(run / "adapter")
    assert error.message == f"{run}/adapter is a LoRA adapter for the base model 'google/gemma-7b', a model is expected"
    for told in ("model.adapter=", "gemma-tune generate", "gemma-tune merge"):
        assert f"{told}{'' if '=' in told else ' '}{run}/adapter" in (error.hint or "")


def test_what_lies_at_a_path_is_told_by_its_files(run: Path, directory: Path) -> None:
    kinds = {
        "": "run",
        "adapter": "adapter",
        "export": "exports",
        "export/adapter": "adapter",
        "export/gguf": "gguf-file",
    }
    assert {place: resolve(str(run / place)).kind for place in kinds} == kinds
    assert resolve(str(run / "export" / "gguf")).path == run / "export" / "gguf" / "model.gguf"
    assert resolve(str(directory)).kind == "model"
    (run / "export" / "gguf" / "other.gguf").touch()
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        resolve(str(run / "export" / "gguf"))


def test_what_is_no_model_is_refused_with_the_command_that_takes_it(run: Path) -> None:
    error = error_of(run)
    assert error.message == f"{run} is a run, a model is expected" and f"model.adapter={run}" in (error.hint or "")
    error = error_of(run / "export")
    assert "is a directory of exports" in error.message and f"{run}/export/merged-16bit" in (error.hint or "")
    assert "is a GGUF file" in error_of(run / "export" / "gguf").message


@pytest.mark.parametrize("wanted", ["a run", "a run or an adapter"])
def test_a_model_is_refused_where_a_run_is_wanted(wanted: Any, directory: Path, run: Path) -> None:
    for path in (Path(TINY), directory, run / "export" / "gguf"):
        with pytest.raises(RunError, match=rf"is a .*, {wanted} is expected"):
            refuse_other(path, wanted, error=RunError)
    for path in (run, Path("nowhere"), Path("no/where"), run / "nowhere"):
        refuse_other(path, wanted, error=RunError)


def test_a_path_below_a_directory_that_is_here_is_no_hub_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    for name in ("run/nope", "run/nope/export/merged"):  # the latter could be a handle of Kaggle's
        assert error_of(name).message == f"{name}: no such directory"
    assert resolve("elsewhere/nope").kind == "hub"


def test_a_kaggle_handle_is_a_model() -> None:
    handle = "google/gemma/transformers/2b-it"
    assert (resolve_model(handle).kind, resolve_model(handle).location) == ("kaggle", handle)


def test_a_model_beside_an_adapter_is_refused(directory: Path) -> None:
    """transformers loads the adapter's base instead of the weights that lie there."""
    write_json(directory / "adapter_config.json", {"base_model_name_or_path": "someone/else"})
    assert "'someone/else'" in error_of(directory).message
    with pytest.raises(ModelError, match="holds a LoRA adapter next to a model"):
        check_directory(directory)
