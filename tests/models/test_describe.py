"""The oracle is transformers: every architecture of the registry, at its true size, as a model on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from transformers import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

from gemma_tune.errors import ModelError
from gemma_tune.models.catalogue import ARCHITECTURES, LORA_PROJECTIONS
from gemma_tune.models.config import TextConfig, check_config
from gemma_tune.models.describe import (
    LayerRow,
    count_lora_params,
    count_params,
    count_weight_bytes,
    select_lora_rows,
    summarize,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "gemma3n_text": (transformers.Gemma3nTextConfig, transformers.Gemma3nForCausalLM),
    "gemma4_text": (transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM),
    "gemma4_unified_text": (Gemma4UnifiedTextConfig, Gemma4UnifiedForCausalLM),
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL_3N = {**SMALL, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
SMALL_4 = {**SMALL, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", **SMALL},
    "gemma untied, bias": {"model_type": "gemma", **SMALL, "tie_word_embeddings": False, "attention_bias": True},
    "gemma2": {"model_type": "gemma2", **SMALL},
    "gemma3": {"model_type": "gemma3_text", **SMALL},
    "gemma3n": {
        "model_type": "gemma3n_text",
        **SMALL_3N,
        "intermediate_size": [96, 64, 96, 64, 96, 64],
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4": {"model_type": "gemma4_text", **SMALL_4},
    "gemma4 small ones": {
        "model_type": "gemma4_text",
        **SMALL_3N,
        "global_head_dim": 32,
        "use_double_wide_mlp": True,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4 experts": {
        "model_type": "gemma4_text",
        **SMALL_4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}


def build(content: dict[str, Any], *, device: str) -> Any:
    text = dict(content.get("text_config", content))
    config_class, model_class = CLASSES[text.pop("model_type")]
    with torch.device(device):
        return model_class(config_class(**text))


def count_by_module(model: Any) -> dict[str, int]:
    """Module name → parameters that it holds itself; a tied head has none (named_parameters gives each weight once)."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.rsplit(".", 1)[0]] += parameter.numel()
    return dict(counts)


def small_config(name: str) -> TextConfig:
    return check_config(SMALL_MODELS[name], name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_module_of_every_size_agrees_with_transformers(name: str) -> None:
    rows = summarize(check_config(ARCHITECTURES[name], name))
    expected = count_by_module(build(dict(ARCHITECTURES[name]), device="meta"))
    assert {row.name: row.num_params for row in rows if row.num_params} == expected


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_module_of_small_models_agrees_with_transformers(name: str) -> None:
    rows = summarize(small_config(name))
    assert {row.name: row.num_params for row in rows if row.num_params} == count_by_module(
        build(SMALL_MODELS[name], device="meta")
    )
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_output_shapes_agree_with_a_forward_pass(name: str) -> None:
    model = build(SMALL_MODELS[name], device="cpu").eval()
    seen: dict[str, tuple[int, ...]] = {}

    def note(module_name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen[module_name] = tuple(output.shape)

        return hook

    for module_name, module in model.named_modules():
        module.register_forward_hook(note(module_name))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 11).reshape(2, 5))
    # Experts see batch and tokens flattened, AltUp stacks its streams in front, and heads stand before or after the
    # tokens: what holds everywhere is the number of features, and where there is nothing of that the whole shape.
    rows = [row for row in summarize(small_config(name)) if row.name in seen]
    assert {row.name for row in rows} >= {row.name for row in summarize(small_config(name)) if row.kind == "Linear"} - {
        f"model.layers.{i}.altup.{part}" for i in range(6) for part in ("prediction_coefs", "correction_coefs")
    }
    for row in rows:
        assert seen[row.name][-1] == row.output_shape[-1], row
    plain = [row for row in rows if "self_attn" in row.name or "mlp" in row.name or row.name == "lm_head"]
    for row in plain:
        if len(row.output_shape) == 3:
            assert seen[row.name] == (2, 5, row.output_shape[2]), row
    assert len(plain) > 6 * 5


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_head_norm_shapes_agree_with_a_forward_pass(name: str) -> None:
    model = build(SMALL_MODELS[name], device="cpu").eval()
    seen: dict[str, set[tuple[int, ...]]] = {}
    rows = {row.name: row for row in summarize(small_config(name)) if row.name.endswith(("q_norm", "k_norm"))}
    for module_name in rows:
        module = model.get_submodule(module_name)
        module.register_forward_hook(
            lambda module, args, output, name=module_name: seen.update({name: {tuple(output.shape)}})
        )
    with torch.no_grad():
        model(input_ids=torch.arange(1, 11).reshape(2, 5))
    for module_name, row in rows.items():
        _, _, num_heads, size = row.output_shape
        assert num_heads is not None and size is not None
        # Gemma 3 norms after the heads are moved to the front, Gemma 3n and 4 before.
        assert seen[module_name] <= {(2, 5, num_heads, size), (2, num_heads, 5, size)}
    assert bool(rows) == (small_config(name).family in ("gemma3", "gemma3n", "gemma4"))


@pytest.mark.parametrize(
    ("architecture", "published"),
    [
        # KerasHub's presets and, for Gemma 7B, the Gemma report (arXiv:2403.08295, table 2).
        ("gemma-2b", 2_506_172_416),
        ("gemma-7b", 8_537_680_896),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-2-27b", 27_227_128_320),
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_published_counts(architecture: str, published: int) -> None:
    assert count_params(check_config(ARCHITECTURES[architecture], architecture)) == published


@pytest.mark.parametrize(
    ("architecture", "published"),
    [("gemma-3-4b", 3_880_099_328), ("gemma-3-12b", 11_765_788_416), ("gemma-3-27b", 27_009_002_240)],
)
def test_published_text_counts_of_gemma_3(architecture: str, published: int) -> None:
    """KerasHub cuts the hub's vocabulary of 262,208 to the 262,144 entries that the tokenizer has."""
    config = check_config(ARCHITECTURES[architecture], architecture)
    assert count_params(config) == published + 64 * config.hidden_size


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_layer_view_folds_but_loses_nothing(name: str) -> None:
    config = small_config(name)
    rows = summarize(config, by="layer")
    assert sum(row.num_params for row in rows) == count_params(config)
    layers = [row for row in rows if row.kind == "DecoderLayer"]
    assert [row.name for row in layers] == [f"model.layers.{i}" for i in range(config.num_layers)]
    assert [row.connected_to for row in layers] == ["model.embed_tokens", *(row.name for row in layers[:-1])]
    assert rows[0].name == "model.embed_tokens" and rows[-1].name == "lm_head"


def test_tied_head_has_no_parameters_of_its_own() -> None:
    head = summarize(small_config("gemma"))[-1]
    assert (head.name, head.num_params, head.shape_text) == ("lm_head", 0, "(None, None, 512)")
    assert "model.embed_tokens" in head.connected_to
    untied = summarize(small_config("gemma untied, bias"))[-1]
    assert untied.num_params == 512 * 64


def lora_params(content: dict[str, Any], *, rank: int, targets: Any) -> int:
    model = build(content, device="cpu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    return sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize(
    "targets", [LORA_PROJECTIONS, ("q_proj", "down_proj"), ("all-linear",), ("layers.1.self_attn.o_proj",)]
)
def test_lora_counts_agree_with_peft(name: str, targets: tuple[str, ...]) -> None:
    given = "all-linear" if targets == ("all-linear",) else list(targets)
    expected = lora_params(SMALL_MODELS[name], rank=3, targets=given)
    assert count_lora_params(small_config(name), rank=3, targets=targets) == expected > 0


def test_lora_on_embedding_and_head_agrees_with_peft() -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    expected = lora_params(SMALL_MODELS["gemma untied, bias"], rank=2, targets=targets)
    assert count_lora_params(small_config("gemma untied, bias"), rank=2, targets=targets) == expected


def test_flagship_lora_count() -> None:
    """Rank 16 on Gemma 7B's seven projections, by hand: 28 layers of 4 attention and 3 MLP matrices."""
    config = check_config(ARCHITECTURES["gemma-7b"], "7b")
    by_hand = 16 * 28 * (4 * (3072 + 4096) + 3 * (3072 + 24_576))
    assert count_lora_params(config, rank=16, targets=LORA_PROJECTIONS) == by_hand == 50_003_968


def test_lora_targets_count_once() -> None:
    config = small_config("gemma")
    once = count_lora_params(config, rank=4, targets=["q_proj"])
    assert count_lora_params(config, rank=4, targets=["q_proj", "q_proj", "self_attn.q_proj"]) == once


def test_unknown_lora_target_is_named_with_the_nearest() -> None:
    with pytest.raises(ModelError) as caught:
        select_lora_rows(small_config("gemma"), ["q_porj"])
    assert "'q_porj'" in caught.value.message
    assert caught.value.hint is not None and "did you mean 'q_proj'?" in caught.value.hint


def test_lora_on_a_norm_is_refused() -> None:
    with pytest.raises(ModelError, match="RMSNorm"):
        count_lora_params(small_config("gemma"), rank=4, targets=["input_layernorm"])


def test_lora_rank_below_one_is_refused() -> None:
    with pytest.raises(ModelError, match="rank is 0"):
        count_lora_params(small_config("gemma"), rank=0, targets=["q_proj"])


@pytest.mark.parametrize(("load", "dtype"), [("float32", torch.float32), ("16bit", torch.bfloat16)])
def test_plain_weight_bytes_are_those_of_the_tensors(load: Any, dtype: torch.dtype) -> None:
    model = build(SMALL_MODELS["gemma4 experts"], device="cpu").to(dtype)
    expected = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert count_weight_bytes(small_config("gemma4 experts"), load=load) == expected


def quantized_bytes(row: LayerRow) -> int:
    """What bitsandbytes really stores for a matrix of this shape."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(row.weight_shape), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    tensors = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", ["gemma", "gemma untied, bias", "gemma4 experts", "wide"])
def test_4bit_weight_bytes_are_those_of_bitsandbytes(name: str) -> None:
    # Wide enough for several second-level blocks (each of 64 · 256 weights) and for a last one that is not full.
    wide = {**SMALL_MODELS["gemma"], "hidden_size": 320, "intermediate_size": 840, "num_hidden_layers": 1}
    config = check_config(wide if name == "wide" else SMALL_MODELS[name], name)
    expected = 0
    for row in summarize(config):
        if row.kind == "Linear" and row.name != "lm_head":
            bias = row.num_params - row.weight_shape[0] * row.weight_shape[1]
            expected += quantized_bytes(row) + 2 * bias
        else:
            expected += 2 * row.num_params
    assert count_weight_bytes(config, load="4bit") == expected


def test_4bit_of_gemma_7b_is_a_little_over_half_a_byte_a_linear_weight() -> None:
    """0.516 bytes: 4 bits, and 0.127 bits of statistics (QLoRA, section 3); the embedding stays 16-bit."""
    config = check_config(ARCHITECTURES["gemma-7b"], "7b")
    embedding_bytes = 2 * 256_000 * 3072
    linear = count_params(config) - 256_000 * 3072
    share = (count_weight_bytes(config, load="4bit") - embedding_bytes) / linear
    assert share == pytest.approx(0.516, abs=5e-4)
