from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.architecture import add_hyperparameters, read_architecture
from gemma_tune.models.catalogue import ARCHITECTURES


class RecordedWriter:
    """Takes the place of gguf.GGUFWriter and keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.told.__setitem__(name.removeprefix("add_"), value)


def write(directory: Path, content: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def hyperparameters(directory: Path) -> dict[str, Any]:
    pytest.importorskip("gguf")
    writer = RecordedWriter()
    add_hyperparameters(writer, read_architecture(directory))
    return writer.told


GEMMA_2 = Gemma2Config(num_hidden_layers=4).to_dict()
GEMMA_3 = Gemma3TextConfig(num_hidden_layers=7).to_dict()


@pytest.mark.parametrize("name", sorted(name for name in ARCHITECTURES if not name.startswith(("gemma-3n", "gemma-4"))))
def test_every_gemma_1_to_3_can_be_written(name: str, tmp_path: Path) -> None:
    # The hub's 9B had 224 here until July 2024, a mistake (huggingface/transformers issue 31891).
    corrected = {"query_pre_attn_scalar": 256} if name == "gemma-2-9b" else {}
    assert read_architecture(write(tmp_path, {**ARCHITECTURES[name], **corrected})).notes == ()


@pytest.mark.parametrize("name", sorted(name for name in ARCHITECTURES if name.startswith(("gemma-3n", "gemma-4"))))
def test_later_gemmas_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model_type is gemma(3n|4)\w*: only Gemma 1, Gemma 2, Gemma 3 can"):
        read_architecture(write(tmp_path, dict(ARCHITECTURES[name])))


def test_gemma_1_hyperparameters(tmp_path: Path) -> None:
    config = GemmaConfig(rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    assert hyperparameters(write(tmp_path, config.to_dict())) == {
        "context_length": 8192,
        "embedding_length": 3072,
        "block_count": 28,
        "feed_forward_length": 24576,
        "head_count": 16,
        "head_count_kv": 16,
        "key_length": 256,
        "value_length": 256,
        "layer_norm_rms_eps": 1e-6,
        "rope_freq_base": 12345.0,
    }


def test_gemma_2_adds_window_and_soft_caps(tmp_path: Path) -> None:
    told = hyperparameters(write(tmp_path, GEMMA_2 | {"sliding_window": 77, "attn_logit_softcapping": 40.0}))
    assert told["sliding_window"] == 77
    assert told["attn_logit_softcapping"] == 40.0
    assert told["final_logit_softcapping"] == 30.0


def test_gemma_3_adds_two_rope_bases_and_the_linear_factor(tmp_path: Path) -> None:
    import gguf

    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    told = hyperparameters(write(tmp_path, GEMMA_3 | {"rope_parameters": rope}))
    assert (told["rope_freq_base"], told["rope_freq_base_swa"]) == (1e6, 2e4)
    assert (told["rope_scaling_type"], told["rope_scaling_factor"]) == (gguf.RopeScalingType.LINEAR, 8.0)
    older = {key: value for key, value in GEMMA_3.items() if key != "rope_parameters"}
    older |= {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    assert hyperparameters(write(tmp_path, older)) == told


def test_multimodal_gemma_3_is_read_through_its_text_config(tmp_path: Path) -> None:
    config = Gemma3Config(text_config=Gemma3TextConfig(num_hidden_layers=7, hidden_size=128)).to_dict()
    assert hyperparameters(write(tmp_path, config))["embedding_length"] == 128


def test_plain_gelu_is_noted(tmp_path: Path) -> None:
    (note,) = read_architecture(write(tmp_path, GemmaConfig(hidden_act="gelu").to_dict())).notes
    assert "gelu_pytorch_tanh" in note


ALL_FULL = ["full_attention"] * 4
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GEMMA_2 | {"query_pre_attn_scalar": 224}, r"query_pre_attn_scalar is 224; llama\.cpp takes 256 for 4 layers"),
        (GEMMA_3 | {"query_pre_attn_scalar": 64}, r"query_pre_attn_scalar is 64; llama\.cpp takes 256"),
        (GEMMA_2 | {"attn_logit_softcapping": None}, r"attn_logit_softcapping is null"),
        (GEMMA_2 | {"final_logit_softcapping": None}, r"final_logit_softcapping is null"),
        (GEMMA_3 | {"final_logit_softcapping": 30.0}, r"a soft cap is set"),
        (GEMMA_2 | {"layer_types": ALL_FULL}, r"layer_types is not llama\.cpp's pattern for gemma2"),
        (GEMMA_3 | {"layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"]}, r"layer_types"),
        (GEMMA_2 | {"rope_parameters": YARN}, r"the rope scaling is yarn"),
        (GemmaConfig(rope_parameters=YARN | {"rope_type": "linear"}).to_dict(), r"the rope scaling is linear"),
        (GEMMA_2 | {"hidden_activation": "silu"}, r"the activation is silu"),
        (GEMMA_2 | {"attention_bias": True}, r"attention_bias is true"),
        (GEMMA_2 | {"quantization_config": {"quant_method": "bitsandbytes"}}, r"the weights are quantised"),
    ],
)
def test_what_a_gguf_cannot_carry_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        read_architecture(write(tmp_path, content))
    assert "merged-16bit" in str(caught.value.hint)


def test_the_largest_models_scale_by_their_width(tmp_path: Path) -> None:
    large = Gemma2Config(num_hidden_layers=46, hidden_size=4608, num_attention_heads=32, query_pre_attn_scalar=144)
    read_architecture(write(tmp_path, large.to_dict()))
    with pytest.raises(ExportError, match=r"llama\.cpp takes 144 for 46 layers"):
        read_architecture(write(tmp_path, large.to_dict() | {"query_pre_attn_scalar": 128}))
