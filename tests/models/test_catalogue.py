"""The table of models is complete, and every name or path becomes something to load or one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import (
    ARCHITECTURES,
    LORA_PROJECTIONS,
    MODELS,
    NOT_KNOWN,
    TINY,
    GemmaModel,
    describe_config,
    describe_model,
    find_model,
    resolve_model,
)
from gemma_tune.models.describe import select_lora_rows
from gemma_tune.paths import TINY_MODEL_DIR

GOOGLES = [model for model in MODELS.values() if model.name != TINY]
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


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_every_row_is_complete(model: GemmaModel) -> None:
    assert MODELS[model.name] is model and model.name == model.name.lower()
    assert model.stop_tokens[0] == "<eos>"
    assert (len(model.stop_tokens) > 1) == (model.is_instruction_tuned or model.name.startswith("codegemma"))
    assert model.is_instruction_tuned == model.name.endswith("-it")
    assert model.lora_targets == LORA_PROJECTIONS
    assert model.licence
    if model.name == TINY:
        assert model.hub_id is None and model.location == str(TINY_MODEL_DIR)
        return
    assert model.hub_id is not None and model.hub_id.startswith("google/")
    assert model.location == model.hub_id
    assert model.architecture in ARCHITECTURES
    is_gemma_4 = model.name.startswith("gemma-4-")
    assert model.licence == ("Apache-2.0" if is_gemma_4 else "Gemma Terms of Use")
    assert model.licence_url is not None and model.licence_url.startswith("https://ai.google.dev/gemma/")
    assert model.is_gated != is_gemma_4
    assert (model.modality != "text") == model.config.is_multimodal
    assert model.num_checkpoint_params is None or model.num_checkpoint_params > model.num_params
    for mirror in (model.mirror_16bit, model.mirror_4bit, *model.other_mirrors):
        assert mirror is None or mirror.startswith(f"unsloth/{model.hub_id.split('/')[1]}")


def test_the_members_that_a_person_may_ask_for_are_there() -> None:
    wanted = {TINY, "gemma-2b", "gemma-2b-it", "gemma-7b", "gemma-7b-it", "gemma-1.1-2b-it", "gemma-1.1-7b-it"}
    wanted |= {"codegemma-2b", "codegemma-7b", "codegemma-7b-it", "codegemma-1.1-2b", "codegemma-1.1-7b-it"}
    for base in (
        *("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
        *("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b"),
        *("gemma-3n-e2b", "gemma-3n-e4b"),
        *("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b"),
    ):
        wanted |= {base, f"{base}-it"}
    assert set(MODELS) == wanted
    assert {model.architecture for model in GOOGLES} == set(ARCHITECTURES)


def test_no_name_means_two_models() -> None:
    names = [name.lower() for model in MODELS.values() for name in model.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_every_name_is_found_in_any_case(model: GemmaModel) -> None:
    for name in model.names:
        assert find_model(name) is model
        assert find_model(f" {name.upper()} ") is model


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("gemma_2b_en", "gemma-2b"),
        ("gemma_instruct_2b_en", "gemma-2b-it"),
        ("gemma_7b_en", "gemma-7b"),
        ("gemma_instruct_7b_en", "gemma-7b-it"),
        ("gemma_1.1_instruct_7b_en", "gemma-1.1-7b-it"),
        ("code_gemma_instruct_7b_en", "codegemma-7b-it"),
        ("gemma2_instruct_9b_en", "gemma-2-9b-it"),
        ("gemma3_instruct_1b", "gemma-3-1b-it"),
        ("gemma3_4b_text", "gemma-3-4b"),
        ("gemma4_instruct_26b_a4b", "gemma-4-26b-a4b-it"),
    ],
)
def test_keras_presets_resolve(preset: str, name: str) -> None:
    assert find_model(preset).name == name
    assert resolve_model(preset).location == MODELS[name].hub_id


def test_known_architecture_facts() -> None:
    """Gemma report (arXiv:2403.08295), table 1."""
    small, large = MODELS["gemma-2b"].config, MODELS["gemma-7b"].config
    assert (small.num_layers, small.num_heads, small.num_kv_heads, small.hidden_size) == (18, 8, 1, 2048)
    assert (large.num_layers, large.num_heads, large.num_kv_heads, large.hidden_size) == (28, 16, 16, 3072)
    # The report counts the FFN's gate and up projections together.
    assert (2 * small.intermediate_size, 2 * large.intermediate_size) == (32_768, 49_152)
    assert {config.head_dim for config in (small, large)} == {256}
    assert {(config.context_tokens, config.vocab_size) for config in (small, large)} == {(8192, 256_000)}
    assert dict(describe_config(small))["Attention"] == "8 heads, 1 for keys and values (multi-query)"
    assert dict(describe_config(large))["Attention"] == "16 heads, 16 for keys and values (multi-head)"


_SMALL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "global_head_dim": 64,
    "use_clipped_linears": True,
}
_LARGE_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "global_head_dim": 72,
    "standardize": True,
}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
_GEMMA_3 = (transformers.Gemma3Config, transformers.Gemma3ForConditionalGeneration, {"vision_config": _SIGLIP})
_GEMMA_4 = (transformers.Gemma4Config, transformers.Gemma4ForConditionalGeneration)
CHECKPOINTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma-3-4b": _GEMMA_3,
    "gemma-3-12b": _GEMMA_3,
    "gemma-3-27b": _GEMMA_3,
    "gemma-4-e2b": (*_GEMMA_4, {"vision_config": _SMALL_VISION, "audio_config": {}}),
    "gemma-4-e4b": (*_GEMMA_4, {"vision_config": _SMALL_VISION, "audio_config": {}}),
    "gemma-4-12b": (
        Gemma4UnifiedConfig,
        Gemma4UnifiedForConditionalGeneration,
        {"vision_config": {}, "audio_config": {}},
    ),
    "gemma-4-26b-a4b": (*_GEMMA_4, {"vision_config": _LARGE_VISION}),
    "gemma-4-31b": (*_GEMMA_4, {"vision_config": _LARGE_VISION}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_whole_checkpoints_agree_with_transformers(name: str) -> None:
    """Parameters with the towers, where the text model's layers are, and that each LoRA target lies there."""
    config_class, model_class, towers = CHECKPOINTS[name]
    text = {key: value for key, value in ARCHITECTURES[name]["text_config"].items() if key != "model_type"}
    with torch.device("meta"):
        checkpoint = model_class(config_class(text_config=text, **towers))
    model = MODELS[name]
    assert sum(parameter.numel() for parameter in checkpoint.parameters()) == model.num_checkpoint_params
    assert MODELS[f"{name}-it"].num_checkpoint_params == model.num_checkpoint_params
    modules = dict(checkpoint.named_modules())
    assert len(modules[f"{model.text_prefix}.layers"]) == model.config.num_layers
    for row in select_lora_rows(model.config, model.lora_targets):
        module = modules[f"{model.text_prefix}.{row.name.removeprefix('model.')}"]
        assert isinstance(module, torch.nn.Linear) and tuple(module.weight.shape) == row.weight_shape


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
    assert (source.kind, source.location) == ("registry", "google/gemma-7b")
    assert source.model is MODELS["gemma-7b"] and source.config == MODELS["gemma-7b"].config
    assert resolve_model("Unsloth/gemma-7b-BNB-4bit").location == "unsloth/gemma-7b-bnb-4bit"
    assert resolve_model("google/gemma-3-1b-pt").model is MODELS["gemma-3-1b"]
    assert resolve_model("gemma-3-1b-pt").location == "google/gemma-3-1b-pt"


def test_gemma_tiny_is_read_from_its_own_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_tune.models.catalogue.TINY_MODEL_DIR", directory)
    source = resolve_model(TINY)
    assert (source.kind, source.location) == ("registry", str(directory))
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
    assert (source.kind, source.location, source.model) == ("directory", str(directory.resolve()), None)
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
    assert resolve_model("gemma-2b").kind == "registry"
    assert resolve_model("./gemma-2b").kind == "directory"
    (directory.parent / "google").mkdir()
    (directory.parent / "gemma-2b").rename(directory.parent / "google" / "gemma-2b")
    assert resolve_model("google/gemma-2b").kind == "directory"


@pytest.mark.parametrize("name", ["./none", "../none", "/none/at/all", "~/none-at-all", "a/b/c", "models/", r"a\b"])
def test_a_path_that_is_not_there_says_so(name: str) -> None:
    assert error_of(name).message == f"{name}: no such directory"


def test_a_name_that_the_file_system_refuses_is_an_error_of_ours() -> None:
    assert "cannot be read" in error_of("./" + "x" * 5000).message


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    error = error_of(path)
    assert "is a file" in error.message
    assert error.hint is not None and "GGUF" in error.hint


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
    assert "model-00002-of-00002.safetensors is missing" in error_of(directory).message
    safetensors.torch.save_file({"v": torch.zeros(4)}, directory / "model-00002-of-00002.safetensors")
    assert resolve_model(str(directory)).kind == "directory"


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
    assert resolve_model(str(directory)).kind == "directory"


@pytest.mark.parametrize("place", [".", "adapter"])
def test_an_adapter_names_its_base_and_the_commands(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    write_json(tmp_path / place / "adapter_config.json", {"base_model_name_or_path": "google/gemma-7b"})
    error = error_of(tmp_path)
    assert "LoRA adapter" in error.message and "'google/gemma-7b'" in error.message
    assert error.hint is not None and "gemma-tune generate" in error.hint and "gemma-tune merge" in error.hint


def test_a_model_beside_an_adapter_is_refused(directory: Path) -> None:
    """transformers loads the adapter's base instead of the weights that lie there."""
    write_json(directory / "adapter_config.json", {"base_model_name_or_path": "someone/else"})
    assert "'someone/else'" in error_of(directory).message


@pytest.mark.parametrize("model", GOOGLES, ids=lambda model: model.name)
def test_every_model_can_be_shown(model: GemmaModel) -> None:
    facts = dict(describe_model(model))
    assert facts["Name"] == model.name
    assert facts["Parameters, text model"] == f"{model.num_params:,}"
    assert all(facts.values()) and "None" not in " ".join(facts.values())


def test_what_is_not_known_says_so() -> None:
    assert dict(describe_model(MODELS["gemma-3n-e2b"]))["Parameters, checkpoint"] == NOT_KNOWN
    assert dict(describe_model(MODELS["gemma-4-12b"]))["Keras presets"] == NOT_KNOWN
    assert "Keras presets" in dict(describe_model(MODELS["gemma-7b"]))


def test_the_registry_loads_no_heavy_library() -> None:
    code = (
        "import sys; import gemma_tune.models.catalogue as registry;"
        "[model.num_params for model in registry.MODELS.values() if model.hub_id];"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'safetensors', 'numpy', 'huggingface_hub', 'pydantic'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
