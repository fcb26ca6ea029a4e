"""The table of models is complete, and agrees with transformers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

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
    look_up,
)
from gemma_tune.models.describe import select_lora_rows
from gemma_tune.paths import TINY_MODEL_DIR

GOOGLES = [model for model in MODELS.values() if model.name != TINY]


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_every_row_is_complete(model: GemmaModel) -> None:
    assert MODELS[model.name] is model and model.name == model.name.lower()
    assert model.stop_tokens[0] == "<eos>"
    assert (len(model.stop_tokens) > 1) == (model.is_instruction_tuned or model.name.startswith("codegemma"))
    assert model.is_instruction_tuned == model.name.endswith("-it")
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
    assert look_up(preset) == (MODELS[name], MODELS[name].hub_id)


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
    for row in select_lora_rows(model.config, LORA_PROJECTIONS):
        module = modules[f"{model.text_prefix}.{row.name.removeprefix('model.')}"]
        assert isinstance(module, torch.nn.Linear) and tuple(module.weight.shape) == row.weight_shape


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
