"""What config.json says, compared with what transformers makes of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers
from transformers import Gemma4UnifiedTextConfig

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import ARCHITECTURES, describe_config
from gemma_tune.models.config import TextConfig, check_config, read_config
from gemma_tune.models.describe import summarize
from gemma_tune.models.untrusted import check_no_code

CONFIG_CLASSES: dict[str, Any] = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gemma3n_text": transformers.Gemma3nTextConfig,
    "gemma4_text": transformers.Gemma4TextConfig,
    "gemma4_unified_text": Gemma4UnifiedTextConfig,
}
GEMMA = {"model_type": "gemma"}


def reference_of(content: dict[str, Any]) -> Any:
    text = dict(content)
    return CONFIG_CLASSES[text.pop("model_type")](**text)


def assert_agrees(config: TextConfig, theirs: Any) -> None:
    same = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.has_tied_embeddings,
        "attention_bias": config.has_attention_bias,
    }
    assert {name: getattr(theirs, name) for name in same} == same
    # Gemma 4's vary by layer; transformers gives the file's own value on demand, and each layer's in per_layer_config.
    theirs.allow_global_per_layer_attribute_access = True
    assert (theirs.head_dim, theirs.num_key_value_heads) == (config.head_dim, config.num_kv_heads)
    if config.family == "gemma4":
        shapes = [
            (theirs.per_layer_config[i].head_dim, theirs.per_layer_config[i].num_key_value_heads)
            for i in range(config.num_layers)
        ]
        assert [(layer.head_dim, layer.num_kv_heads) for layer in config.layers] == shapes
    assert config.activation == getattr(theirs, "hidden_activation", getattr(theirs, "hidden_act", None))
    for name, ours in (
        ("query_pre_attn_scalar", config.query_pre_attn_scalar),
        ("attn_logit_softcapping", config.attention_softcap),
        ("final_logit_softcapping", config.final_softcap),
    ):
        assert getattr(theirs, name, None) == ours, name
    assert getattr(theirs, "num_kv_shared_layers", 0) == config.num_kv_shared_layers
    assert getattr(theirs, "hidden_size_per_layer_input", 0) == config.per_layer_hidden_size
    kinds = getattr(theirs, "layer_types", ["full_attention"] * config.num_layers)
    assert [f"{layer.attention}_attention" for layer in config.layers] == kinds
    if "sliding_attention" in kinds:
        assert config.sliding_window == theirs.sliding_window
    rope = theirs.rope_parameters
    if config.family in ("gemma", "gemma2"):
        assert (config.rope_theta, config.rope_local_theta) == (rope["rope_theta"], None)
    else:
        assert config.rope_theta == rope["full_attention"]["rope_theta"]
        assert config.rope_local_theta == rope["sliding_attention"]["rope_theta"]
        scaling = rope["full_attention"]["rope_type"]
        assert (config.rope_scaling is None) == (scaling == "default")
        assert config.rope_scaling is None or config.rope_scaling.startswith(scaling)


@pytest.mark.parametrize("model_type", CONFIG_CLASSES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """An all but empty config.json means the same to us as to transformers."""
    content = {"model_type": model_type}
    assert_agrees(check_config(content, "x"), reference_of(content))


@pytest.mark.parametrize("num_layers", [5, 6, 7])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"])
def test_attention_pattern_at_other_depths(model_type: str, num_layers: int) -> None:
    """Gemma 4 ends with a full layer at every depth, the others end where their pattern does."""
    content = {"model_type": model_type, "num_hidden_layers": num_layers}
    config = check_config(content, "x")
    assert_agrees(config, reference_of(content))
    if model_type.startswith("gemma4"):
        assert config.layers[-1].attention == "full"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_means_the_same_to_transformers(name: str) -> None:
    content = dict(ARCHITECTURES[name])
    config = check_config(content, name)
    assert_agrees(config, reference_of(content.get("text_config", content)))
    assert config.is_multimodal == ("text_config" in content)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_saved_by_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """save_pretrained writes other keys than the hub's files have: rope_parameters, per_layer_config, layer_types."""
    content = dict(ARCHITECTURES[name])
    text = dict(content.get("text_config", content))
    reference_of(text).save_pretrained(tmp_path)
    saved = read_config(tmp_path)
    assert saved.model_type == text["model_type"]
    original = check_config(text, name)
    assert saved == original


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_old_and_new_names_of_rope_and_window(model_type: str) -> None:
    old = {"model_type": model_type, "rope_theta": 20_000.0}
    new: dict[str, Any] = {
        "model_type": model_type,
        "rope_parameters": {"rope_theta": 20_000.0, "rope_type": "default"},
    }
    if model_type == "gemma3_text":
        old |= {"rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        old |= {"sliding_window_pattern": 3}
        new["rope_parameters"] = {
            "full_attention": {"rope_theta": 20_000.0, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"},
        }
        new["_sliding_window_pattern"] = 3
    ours = check_config(old, "old")
    assert ours == check_config(new, "new")
    assert_agrees(ours, reference_of(old))
    assert ours.rope_theta == 20_000.0
    if model_type == "gemma3_text":
        assert ours.rope_scaling == "linear, factor 8.0"
        assert [layer.attention for layer in ours.layers[:4]] == ["sliding", "sliding", "full", "sliding"]


def test_quantization_and_dtype_are_read() -> None:
    quantized = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "torch_dtype": "bfloat16",
    }
    config = check_config(GEMMA | quantized, "x")
    assert (config.quantization, config.dtype) == ("bitsandbytes 4-bit", "bfloat16")
    plain = check_config(GEMMA | {"dtype": "float32"}, "x")
    assert (plain.quantization, plain.dtype) == (None, "float32")


@pytest.mark.parametrize("model_type", ["llama", "recurrent_gemma", "paligemma", "t5gemma", None, 3])
def test_other_models_are_refused_by_name(model_type: Any) -> None:
    with pytest.raises(ModelError) as caught:
        check_config({"model_type": model_type, "hidden_size": 8}, "some/config.json")
    assert caught.value.message == f"some/config.json: model_type is {model_type!r}, which is not a Gemma"
    assert caught.value.hint is not None and "gemma-tune models list" in caught.value.hint


def test_gemmas_that_are_no_text_model_are_refused() -> None:
    with pytest.raises(ModelError, match="gemma4_assistant"):
        check_config({"model_type": "gemma4_assistant"}, "x")
    with pytest.raises(ModelError, match="generates no text"):
        check_config({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "x")
    with pytest.raises(ModelError, match="text_config"):
        check_config({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "x")


@pytest.mark.parametrize(
    "content",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"text_config": {"auto_map": {"AutoConfig": "a.B"}}},
        {"parts": [{"deep": {"auto_map": {"AutoConfig": "a.B"}}}]},
        {"_attn_implementation_internal": "someone/kernel"},
        {"attn_implementation": "someone/kernel:module"},
        {"text_config": {"_experts_implementation": "someone/kernel"}},
        {"_attn_implementation": {"text_config": "sdpa", "vision_config": "someone/kernel"}},
    ],
)
def test_code_that_came_with_the_model_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        check_no_code(content, "x")
    with pytest.raises(ModelError):
        check_config({"model_type": "gemma", **content}, "x")


def test_known_implementations_are_accepted() -> None:
    check_no_code({"attn_implementation": "eager", "auto_map": None, "_attn_implementation_internal": "sdpa"}, "x")


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("gemma", "hidden_size", "3072"),
        ("gemma", "hidden_size", True),
        ("gemma", "vocab_size", 0),
        ("gemma", "num_hidden_layers", 10**9),
        ("gemma", "rms_norm_eps", float("nan")),
        ("gemma", "rope_theta", float("inf")),
        ("gemma", "rope_parameters", [1]),
        ("gemma", "tie_word_embeddings", "yes"),
        ("gemma3_text", "layer_types", ["full_attention"]),
        ("gemma3_text", "rope_scaling", "linear"),
        ("gemma3n_text", "intermediate_size", [8, 8]),
        ("gemma3n_text", "num_kv_shared_layers", 35),
        ("gemma4_text", "per_layer_config", {"99": {"head_dim": 512}}),
        ("gemma4_text", "per_layer_config", {"5": {"hidden_size": 512}}),
        ("gemma4_text", "per_layer_config", {"5": {"head_dim": -1}}),
    ],
)
def test_values_without_sense_are_refused_with_their_key(model_type: str, key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        check_config({"model_type": model_type, key: value}, "where.json")
    assert caught.value.message.startswith(f"where.json: {key}")
    assert len(caught.value.message) < 250


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for content in ("{", "[1]", '{"a": "\ud800"}'.encode("utf-8", "surrogatepass")):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(ModelError) as caught:
            read_config(tmp_path)
        assert str(path) in caught.value.message


def test_multimodal_file_is_unwrapped(tmp_path: Path) -> None:
    content = ARCHITECTURES["gemma-3-4b"]
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    config = read_config(tmp_path)
    assert (config.model_type, config.family, config.is_multimodal) == ("gemma3", "gemma3", True)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads) == (262_208, 8, 4)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim"),
    *("rope_theta", "rope_parameters", "rope_scaling", "rope_local_base_freq", "layer_types", "sliding_window"),
    *(
        "sliding_window_pattern",
        "per_layer_config",
        "global_head_dim",
        "num_global_key_value_heads",
        "tie_word_embeddings",
    ),
    *("num_kv_shared_layers", "attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block", "num_experts", "dtype"),
    *("hidden_size_per_layer_input", "altup_num_inputs", "laurel_rank", "quantization_config", "hidden_activation"),
    *("use_bidirectional_attention", "text_config", "attn_implementation", "final_logit_softcapping", "rms_norm_eps"),
]


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    model_type=st.sampled_from([*CONFIG_CLASSES, "gemma3", "gemma4_unified"]),
    values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)
def test_any_json_is_read_or_refused_with_an_error_of_ours(model_type: str, values: dict[str, Any]) -> None:
    content: dict[str, Any] = {"model_type": model_type, **values}
    if model_type in ("gemma3", "gemma4_unified") and "text_config" not in values:
        content = {"model_type": model_type, "text_config": values}
    try:
        config = check_config(content, "x")
    except ModelError:
        return
    assert len(config.layers) == config.num_layers
    assert all(row.num_params >= 0 for row in summarize(config, by="layer"))
    assert all(text for _, text in describe_config(config))
