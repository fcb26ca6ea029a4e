"""The layer table of a Gemma, and what it weighs: parameters, bytes, LoRA parameters. Arithmetic on a TextConfig only.

Names are those of transformers' `Gemma…ForCausalLM`; the tests compare every row with such a model on the meta device.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from gemma_tune.errors import ModelError
from gemma_tune.models.config import LayerShape, TextConfig
from gemma_tune.text import did_you_mean

Kind = Literal["Embedding", "Linear", "RMSNorm", "Experts", "Parameters", "DecoderLayer"]
Shape = tuple[int | None, ...]

ALL_LINEAR = "all-linear"
# bitsandbytes, NF4 with double quantisation (QLoRA, arXiv:2305.14314, section 3): one absmax per 64 weights, itself
# 8-bit with one float32 per 256 of them; per matrix a 16-entry and a 256-entry float32 table and one float32 offset.
_NF4_BLOCK = 64
_NF4_NESTED_BLOCK = 256
_NF4_BYTES_PER_MATRIX = 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class LayerRow:
    """One row of the table.

    `output_shape` is (batch, tokens, features…) with None for what depends on the input. `weight_shape` is that of the
    weight matrix, (out, in) for a Linear and (rows, width) for an Embedding. `num_params` is 0 where the weight belongs
    to another row (tied head).
    """

    name: str
    kind: Kind
    output_shape: Shape
    weight_shape: tuple[int, ...]
    num_params: int
    connected_to: str

    @property
    def shape_text(self) -> str:
        return "(" + ", ".join("None" if size is None else f"{size}" for size in self.output_shape) + ")"


def summarize(config: TextConfig, *, by: Literal["module", "layer"] = "module") -> list[LayerRow]:
    """Every module that holds weights in the order of the data's way through the model; `by="layer"` folds each decoder
    layer into one row, as Keras's `summary()` shows it."""
    rows = list(list_rows(config))
    return rows if by == "module" else _fold_layers(rows, config)


@functools.cache
def list_rows(config: TextConfig) -> tuple[LayerRow, ...]:
    """Every module that holds weights, as `summarize`; made once for a config."""
    return tuple(_model_rows(config))


@functools.cache
def count_params(config: TextConfig) -> int:
    """Parameters of the text model, a tied embedding counted once. Images' and audio's towers are not counted."""
    return sum(row.num_params for row in list_rows(config))


def count_lora_params(config: TextConfig, *, rank: int, targets: Iterable[str]) -> int:
    """Parameters of a rank-`rank` LoRA adapter: rank · (in + out) for each target (arXiv:2106.09685, section 4.1).

    A target is the end of a module's name, as in PEFT; `all-linear` is every linear module but the head. Raises
    ModelError when a target names nothing, or something that is no linear layer or embedding.
    """
    if rank < 1:
        raise ModelError(f"LoRA rank is {rank}, at least 1 is expected")
    return sum(rank * sum(row.weight_shape) for row in select_lora_rows(config, targets))


def select_lora_rows(config: TextConfig, targets: Iterable[str]) -> list[LayerRow]:
    """The modules that `targets` name, in the order of the table. Raises as `count_lora_params`."""
    rows = list_rows(config)
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            names = {row.name for row in rows if row.kind == "Linear" and row.name != "lm_head"}
        else:
            names = {row.name for row in rows if row.name == target or row.name.endswith(f".{target}")}
        if not names:
            endings = sorted({row.name.rsplit(".", 1)[-1] for row in rows if row.kind == "Linear"})
            raise ModelError(
                f"LoRA target {target!r} names no module of this {config.family} model",
                hint=f"{did_you_mean(target, endings)} Linear modules: {', '.join(endings)}.".lstrip(),
            )
        chosen |= names
    selected = [row for row in rows if row.name in chosen]
    for row in selected:
        if row.kind not in ("Linear", "Embedding"):
            raise ModelError(
                f"LoRA target {row.name!r} is a {row.kind}", hint="LoRA can adapt linear layers and embeddings only."
            )
    return selected


def count_weight_bytes(config: TextConfig, *, load: Literal["float32", "16bit", "4bit"]) -> int:
    """Bytes of the text model's weights in memory.

    "4bit" is bitsandbytes NF4 with double quantisation over 16-bit weights: the decoder's linear layers are quantised;
    embeddings, norms, experts (one 3-D parameter, not a linear layer) and the head stay 16-bit.
    """
    if load != "4bit":
        return count_params(config) * (4 if load == "float32" else 2)
    return sum(
        _nf4_bytes(math.prod(row.weight_shape)) + 2 * (row.num_params - math.prod(row.weight_shape))
        if row.kind == "Linear" and row.name != "lm_head"
        else 2 * row.num_params
        for row in list_rows(config)
    )


def _nf4_bytes(num_weights: int) -> int:
    num_blocks = math.ceil(num_weights / _NF4_BLOCK)
    nested = 4 * math.ceil(num_blocks / _NF4_NESTED_BLOCK)
    return math.ceil(num_weights / 2) + num_blocks + nested + _NF4_BYTES_PER_MATRIX


def _fold_layers(rows: list[LayerRow], config: TextConfig) -> list[LayerRow]:
    folded: list[LayerRow] = []
    previous, shape = "model.embed_tokens", (None, None, config.hidden_size)
    for name, group in itertools.groupby(rows, lambda row: ".".join(row.name.split(".")[:3])):
        if not name.startswith("model.layers."):
            folded += group
            continue
        num_params = sum(row.num_params for row in group)
        folded.append(LayerRow(name, "DecoderLayer", shape, (), num_params, previous))
        previous = name
    return folded


def _linear(name: str, size_in: int, size_out: int, connected_to: str, *, bias: bool = False) -> LayerRow:
    num_params = size_in * size_out + (size_out if bias else 0)
    return LayerRow(name, "Linear", (None, None, size_out), (size_out, size_in), num_params, connected_to)


def _norm(name: str, size: int, connected_to: str, *, per_head: int = 0) -> LayerRow:
    shape: Shape = (None, None, per_head, size) if per_head else (None, None, size)
    return LayerRow(name, "RMSNorm", shape, (size,), size, connected_to)


def _embedding(name: str, num_rows: int, width: int) -> LayerRow:
    return LayerRow(name, "Embedding", (None, None, width), (num_rows, width), num_rows * width, "input_ids")


def _parameters(name: str, size: int, connected_to: str) -> LayerRow:
    return LayerRow(name, "Parameters", (None, None, size), (size,), size, connected_to)


def _model_rows(config: TextConfig) -> Iterator[LayerRow]:
    width = config.hidden_size
    yield _embedding("model.embed_tokens", config.vocab_size, width)
    previous = "model.embed_tokens"
    if config.per_layer_hidden_size:
        # Per-layer embeddings (Gemma 3n, Gemma 4 E2B/E4B): one table holds the small embedding of every layer.
        all_layers = config.num_layers * config.per_layer_hidden_size
        yield _embedding("model.embed_tokens_per_layer", config.per_layer_vocab_size, all_layers)
        yield _linear("model.per_layer_model_projection", width, all_layers, previous)
        yield _norm(
            "model.per_layer_projection_norm",
            config.per_layer_hidden_size,
            "model.per_layer_model_projection",
            per_head=config.num_layers,
        )
    # AltUp (arXiv:2301.13310) carries several residual streams; each but the first is projected in and out.
    num_streams = max(config.altup_num_inputs - 1, 0)
    for index in range(num_streams):
        yield _linear(f"model.altup_projections.{index}", width, width, previous)
    for index, layer in enumerate(config.layers):
        yield from _layer_rows(config, layer, f"model.layers.{index}", previous)
        previous = f"model.layers.{index}"
    for index in range(num_streams):
        yield _linear(f"model.altup_unembed_projections.{index}", width, width, previous)
    yield _norm("model.norm", width, previous)
    head = _linear("lm_head", width, config.vocab_size, "model.norm")
    if config.has_tied_embeddings:
        head = replace(head, num_params=0, connected_to="model.norm, weight of model.embed_tokens")
    yield head


def _layer_rows(config: TextConfig, layer: LayerShape, name: str, previous: str) -> Iterator[LayerRow]:
    width = config.hidden_size
    has_post_norms = config.facts.has_post_norms
    if config.altup_num_inputs:
        yield from _altup_rows(config, f"{name}.altup", previous)
    yield _norm(f"{name}.input_layernorm", width, previous)
    if config.laurel_rank:
        yield _linear(f"{name}.laurel.linear_left", width, config.laurel_rank, f"{name}.input_layernorm")
        yield _linear(f"{name}.laurel.linear_right", config.laurel_rank, width, f"{name}.laurel.linear_left")
        yield _norm(f"{name}.laurel.post_laurel_norm", width, f"{name}.laurel.linear_right")
    yield from _attention_rows(config, layer, f"{name}.self_attn", f"{name}.input_layernorm")
    # Gemma 1 calls the norm before the MLP post_attention_layernorm; later families have it after the attention, too.
    yield _norm(f"{name}.post_attention_layernorm", width, f"{name}.self_attn.o_proj")
    before_mlp = f"{name}.post_attention_layernorm"
    if has_post_norms:
        yield _norm(f"{name}.pre_feedforward_layernorm", width, before_mlp)
        before_mlp = f"{name}.pre_feedforward_layernorm"
    yield _linear(f"{name}.mlp.gate_proj", width, layer.intermediate_size, before_mlp)
    yield _linear(f"{name}.mlp.up_proj", width, layer.intermediate_size, before_mlp)
    yield _linear(f"{name}.mlp.down_proj", layer.intermediate_size, width, f"{name}.mlp.gate_proj · up_proj")
    after_mlp = f"{name}.mlp.down_proj"
    if config.num_experts:
        yield from _expert_rows(config, name)
        after_mlp = f"{name}.post_feedforward_layernorm_1 + {name}.post_feedforward_layernorm_2"
    if has_post_norms:
        yield _norm(f"{name}.post_feedforward_layernorm", width, after_mlp)
    if config.per_layer_hidden_size:
        small = config.per_layer_hidden_size
        yield _linear(f"{name}.per_layer_input_gate", width, small, f"{name}.post_feedforward_layernorm")
        yield _linear(
            f"{name}.per_layer_projection", small, width, f"{name}.per_layer_input_gate · model.embed_tokens_per_layer"
        )
        yield _norm(f"{name}.post_per_layer_input_norm", width, f"{name}.per_layer_projection")


def _attention_rows(config: TextConfig, layer: LayerShape, name: str, previous: str) -> Iterator[LayerRow]:
    has_head_norms = config.facts.has_head_norms
    bias = config.has_attention_bias
    size_q = config.num_heads * layer.head_dim
    size_kv = layer.num_kv_heads * layer.head_dim
    yield _linear(f"{name}.q_proj", config.hidden_size, size_q, previous, bias=bias)
    if has_head_norms:
        yield _norm(f"{name}.q_norm", layer.head_dim, f"{name}.q_proj", per_head=config.num_heads)
    if layer.key_values != "shared":
        yield _linear(f"{name}.k_proj", config.hidden_size, size_kv, previous, bias=bias)
        if has_head_norms:
            yield _norm(f"{name}.k_norm", layer.head_dim, f"{name}.k_proj", per_head=layer.num_kv_heads)
    if layer.key_values == "own":
        yield _linear(f"{name}.v_proj", config.hidden_size, size_kv, previous, bias=bias)
    values = {
        "own": "attention of q, k, v",
        "keys_as_values": "attention of q, k, k",
        "shared": "attention of q with an earlier layer's k, v",
    }
    yield _linear(f"{name}.o_proj", size_q, config.hidden_size, values[layer.key_values], bias=bias)


def _altup_rows(config: TextConfig, name: str, previous: str) -> Iterator[LayerRow]:
    num_inputs = config.altup_num_inputs
    yield _norm(f"{name}.router_norm", config.hidden_size, previous)
    yield _linear(f"{name}.modality_router", config.hidden_size, num_inputs, f"{name}.router_norm")
    yield _linear(f"{name}.prediction_coefs", num_inputs, num_inputs**2, f"{name}.modality_router")
    yield _linear(f"{name}.correction_coefs", num_inputs, num_inputs, f"{name}.modality_router")
    yield _parameters(name, config.hidden_size, f"{name}.correction_coefs")


def _expert_rows(config: TextConfig, name: str) -> Iterator[LayerRow]:
    """The mixture beside the dense MLP (Gemma 4 26B-A4B): a router, and the gated MLPs in two 3-D parameters."""
    width, count, inner = config.hidden_size, config.num_experts, config.expert_intermediate_size
    yield _norm(f"{name}.post_feedforward_layernorm_1", width, f"{name}.mlp.down_proj")
    router = f"{name}.router"
    yield _parameters(router, width + count, f"{name}.post_attention_layernorm")
    yield _linear(f"{router}.proj", width, count, router)
    yield _norm(f"{name}.pre_feedforward_layernorm_2", width, f"{name}.post_attention_layernorm")
    yield LayerRow(
        f"{name}.experts",
        "Experts",
        (None, None, width),
        (count, 3, inner, width),
        3 * count * inner * width,
        f"{name}.pre_feedforward_layernorm_2 to {config.num_experts_per_token} of {count} experts by {router}.proj",
    )
    yield _norm(f"{name}.post_feedforward_layernorm_2", width, f"{name}.experts")
