"""Bytes that a training step takes beyond weights and their like, on one card.

What each operation keeps for its backward pass, which the tests measure on tiny Gemmas; what lives in between is a
bound with the coefficients that such measurements gave. Each function names the formula and its source.

Symbols: T tokens of a batch (rows · tokens a row), S tokens a row, H hidden size, I FFN width, V vocabulary, r LoRA
rank, L layers; a bytes of the compute type, s bytes of the residual stream.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from gemma_tune.engines.engine_facts import Head
from gemma_tune.models.config import LayerShape, TextConfig
from gemma_tune.models.describe import LayerRow, list_rows, select_lora_rows
from gemma_tune.planning.memory import is_quantized
from gemma_tune.planning.step import Numerics, Step

_GIB = 2**30
_FLOAT32 = 4
# trl 1.14 computes the head and the loss in checkpointed chunks of this many supervised tokens
# (trl.trainer.sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE).
CHUNK_TOKENS = 256
# unsloth_zoo.fused_losses: bytes a logit that it reckons with; a chunk gets half of what is free, at most 4 GiB.
_FUSED_BYTES_PER_LOGIT = 16
_FUSED_MAX_BYTES = 4 * _GIB
_FUSED_SHARE = 0.5
# Modules that get their input from a norm: it is there once for all of them, unless it has to be cast for each.
_NORM_INPUTS = ("layernorm", "feedforward_layernorm")


def layer_saved_bytes(config: TextConfig, index: int, step: Step) -> int:
    """Count the bytes that decoder layer `index` keeps for its backward pass.

    transformers' code: each norm keeps its input in float32 (4·H·T); attention keeps q, k, v and its output, and
    `eager` the scores as well; GeGLU keeps gate, gelu(gate) and up (3·a·I·T); each adapter keeps its input, where it is
    not kept already, and its r activations. Unsloth's kernels for Gemma 1 and 2 (unsloth/kernels/fast_lora.py,
    rms_layernorm.py): a norm its input in the stream's type, QKV and MLP theirs, and gate and up; nothing else.
    """
    layer, rows, numerics = config.layers[index], _layer_rows(config, index), step.numerics
    attention = _attention_bytes(config, layer, step)
    if step.execution.fuses(config):
        norms = sum(numerics.stream * row.weight_shape[0] + _FLOAT32 for row in rows if row.kind == "RMSNorm")
        inputs = 2 * numerics.compute * config.hidden_size
        return attention + step.batch.size * (norms + inputs + 2 * numerics.compute * layer.intermediate_size)
    norms = sum(_FLOAT32 * (row.weight_shape[0] + 1) * _heads(row) for row in rows if row.kind == "RMSNorm")
    mlp = 3 * numerics.compute * layer.intermediate_size
    experts = 4 * numerics.compute * config.expert_intermediate_size * config.num_experts_per_token
    adapters = _adapter_bytes_per_token(config, rows, step)
    return attention + step.batch.size * (norms + mlp + experts + adapters) + _cast_weight_bytes(config, rows, step)


@functools.cache
def _layer_rows(config: TextConfig, index: int) -> tuple[LayerRow, ...]:
    return tuple(row for row in list_rows(config) if row.name.startswith(f"model.layers.{index}."))


def _heads(row: LayerRow) -> int:
    """Vectors a token that a norm works on: one, or one a head."""
    return row.output_shape[2] or 1 if len(row.output_shape) == 4 else 1


def _attention_bytes(config: TextConfig, layer: LayerShape, step: Step) -> int:
    """q: a·heads·d; k, v: a·kv heads·d each, or a·heads·d where transformers repeats them (eager, sdpa with a mask).
    sdpa, flash: the output, a float32 a head for the softmax's sum, and a·S for a mask. eager: softmax in float32 and
    in the compute type, and tanh where scores are capped: heads·S·(4 + a [if a < 4] + a)."""
    batch, numerics, execution = step.batch, step.numerics, step.execution
    width = layer.head_dim * config.num_heads
    repeats = execution.attention == "eager" or (execution.attention == "sdpa" and batch.padded)
    kv_width = width if repeats and not execution.fuses(config) else layer.head_dim * layer.num_kv_heads
    per_token = numerics.compute * (width + 2 * kv_width)
    if execution.attention != "eager":
        per_token += numerics.compute * width + _FLOAT32 * config.num_heads
        if execution.attention == "sdpa" and batch.padded and not execution.fuses(config):
            per_token += numerics.compute * batch.tokens
    else:
        score = _FLOAT32 + (numerics.compute if numerics.compute < _FLOAT32 else 0)
        score += numerics.compute if config.attention_softcap is not None else 0
        per_token += config.num_heads * batch.tokens * score
    return batch.size * per_token


def _adapter_bytes_per_token(config: TextConfig, rows: tuple[LayerRow, ...], step: Step) -> int:
    """Inputs and rank-r activations of the adapters of a layer; see `Numerics.casts_inputs` for who shares an input."""
    numerics, lora = step.numerics, step.lora
    chosen = _target_names(config, lora.targets)
    total = 0
    counted: set[str] = set()
    for row in rows:
        if row.name not in chosen:
            continue
        size_out, size_in = row.weight_shape
        total += numerics.compute * lora.rank
        if lora.use_dora:
            total += 2 * numerics.compute * size_out
        if lora.dropout:
            total += size_in * (numerics.compute + numerics.dropout_mask)
            continue
        from_norm = row.connected_to.endswith(_NORM_INPUTS)
        own_copy = numerics.compute < _FLOAT32 and (
            numerics.casts_inputs or (from_norm and numerics.stream != numerics.compute)
        )
        # The output of attention is kept by attention itself; o_proj reads it where it lies.
        is_there = row.connected_to.startswith("attention") and step.execution.attention != "eager"
        if own_copy or (row.connected_to not in counted and not is_there):
            total += numerics.compute * size_in
        counted.add(row.connected_to)
    return total


def _cast_weight_bytes(config: TextConfig, rows: tuple[LayerRow, ...], step: Step) -> int:
    """Autocast's 16-bit copies of A and B, which live as long as the graph does."""
    if not step.numerics.autocast:
        return 0
    chosen = _target_names(config, step.lora.targets)
    return step.numerics.compute * step.lora.rank * sum(sum(row.weight_shape) for row in rows if row.name in chosen)


@functools.cache
def _target_names(config: TextConfig, targets: tuple[str, ...]) -> frozenset[str]:
    return frozenset(row.name for row in select_lora_rows(config, targets))


@dataclass(frozen=True)
class Activations:
    """Bytes on the card beyond weights and their like, at the moments of a step that can be its peak."""

    # what the forward pass leaves: every layer's tensors, or with checkpointing every layer's input; and the final
    # norm's, and masks
    stored: int
    masks: int  # of `stored`, what no operation keeps for its backward pass
    head: int  # at the head and loss: `stored`, the hidden states with their gradient, and the logits
    backward: int  # in a layer's backward pass: `stored`, the layer computed again, and gradients in flight
    offloaded: int  # layer inputs in pinned host memory


def activations(config: TextConfig, step: Step, *, free_bytes: int | None = None) -> Activations:
    """Count the activations of a training step.

    Args:
        free_bytes: what weights and their like leave of the card: a fused loss sizes its chunks by it.
    """
    batch, numerics, execution = step.batch, step.numerics, step.execution
    num_layers = len(config.layers)
    # Layers of one shape cost the same: each shape is counted once, at the first layer that has it.
    kinds = Counter(config.layers)
    first = {layer: config.layers.index(layer) for layer in kinds}
    saved = {layer: layer_saved_bytes(config, index, step) for layer, index in first.items()}
    in_flight = {layer: _in_flight_bytes(config, index, step) for layer, index in first.items()}
    hidden = batch.size * config.hidden_size * numerics.stream
    final_norm = batch.size * _FLOAT32 * (config.hidden_size + 1)
    masks = _mask_bytes(config, step)
    offloaded = num_layers * hidden if execution.checkpointing == "offload" else 0
    if execution.checkpointing == "off":
        stored = sum(count * saved[layer] for layer, count in kinds.items())
        alive = max(in_flight.values())
    else:
        # arXiv:1604.06174 with a layer as the segment; Unsloth keeps the inputs on the host and two on the card.
        stored = (2 if execution.checkpointing == "offload" else num_layers) * hidden
        alive = max(saved[layer] + in_flight[layer] for layer in kinds)
    stored += final_norm + masks
    backward = stored - final_norm + alive
    logits = head_bytes(
        config,
        num_tokens=batch.size,
        numerics=numerics,
        head=execution.head,
        free_bytes=None if free_bytes is None else free_bytes - stored - 2 * hidden,
    )
    return Activations(
        stored=stored, masks=masks, head=stored + 2 * hidden + logits, backward=backward, offloaded=offloaded
    )


def _mask_bytes(config: TextConfig, step: Step) -> int:
    """Attention masks, [rows, 1, S, S], shared by all layers; one for each kind of attention that the model has.

    eager: in the compute type. sdpa: one byte an element, and only where something besides the future is hidden:
    padding, or what lies before a window.
    """
    batch, execution = step.batch, step.execution
    if execution.attention == "flash_attention_2" or execution.fuses(config):
        return 0
    kinds = 1 + (0 < config.num_sliding_layers < len(config.layers))
    elements = batch.size * batch.tokens
    if execution.attention == "eager":
        return kinds * elements * step.numerics.compute
    if batch.padded:
        return kinds * elements
    return elements if config.sliding_window is not None and config.sliding_window < batch.tokens else 0


def _in_flight_bytes(config: TextConfig, index: int, step: Step) -> int:
    """Gradients and expanded weights of a layer's backward pass, at its larger moment.

    MLP: the gradients of two of its three wide tensors (one in Unsloth's kernels, which overwrite gate and up), those
    of the residual stream, and the widest weight in the compute type. Attention, when the MLP's tensors are gone: with
    `eager` the gradient of the scores in float32. Coefficients: measured, see tests.
    """
    batch, numerics, execution = step.batch, step.numerics, step.execution
    layer = config.layers[index]
    fused = execution.fuses(config)
    norms = _FLOAT32 if config.facts.has_post_norms and not fused else 0
    stream = (2 * numerics.stream + norms) * config.hidden_size
    wide = (1 if fused else 2) * numerics.compute * layer.intermediate_size
    expanded = 0
    if step.bits == "4bit":
        shapes = [math.prod(row.weight_shape) for row in _layer_rows(config, index) if is_quantized(row)]
        expanded = numerics.compute * max(shapes)
    mlp = batch.size * (wide + stream) + expanded
    if execution.attention != "eager":
        return mlp
    gone = (2 if fused else 3) * numerics.compute * layer.intermediate_size
    scores = config.num_heads * batch.tokens * _FLOAT32
    return max(mlp, batch.size * (scores + stream - gone) + expanded)


def head_bytes(
    config: TextConfig, *, num_tokens: int, numerics: Numerics, head: Head, free_bytes: int | None = None
) -> int:
    """Logits and what the loss makes of them, [tokens at once, V].

    chunked (trl): 256 supervised tokens at once; logits in float32, log-softmax, its exponential and their product for
    the entropy: 16 bytes a logit, 20 with a cap. fused (Unsloth): 16 bytes a logit, in as many chunks as keep a chunk
    below half of the free memory and 4 GiB.
    """
    vocab = config.vocab_size
    if head == "chunked":
        per_logit = 4 * _FLOAT32 + (_FLOAT32 if config.final_softcap is not None else 0)
        cast_head = vocab * config.hidden_size * numerics.compute if numerics.compute < numerics.stream else 0
        return min(CHUNK_TOKENS, num_tokens) * vocab * per_logit + cast_head
    wanted = num_tokens * vocab * _FUSED_BYTES_PER_LOGIT
    target = _FUSED_MAX_BYTES if free_bytes is None else min(_FUSED_MAX_BYTES, max(_FUSED_SHARE * free_bytes, 1))
    if wanted <= target:
        return wanted
    # Chunks come in multiples of four, and a chunk is at least one token.
    chunks = min(4 * math.ceil(wanted / target / 4), num_tokens)
    return math.ceil(num_tokens / chunks) * vocab * _FUSED_BYTES_PER_LOGIT


def evaluation_bytes(config: TextConfig, step: Step, *, answer_tokens: int, free_bytes: int | None = None) -> int:
    """Return the larger of the eval loss and of answering: no layer keeps anything.

    Loss: the residual stream twice, three wide tensors of one layer, its weight expanded, and the head as in training.
    Answers: keys and values of every layer, 2·a·kv heads·d a token, and the logits of the last token in float32.
    """
    batch, numerics = step.batch, step.numerics
    widest = max(layer.intermediate_size for layer in config.layers)
    expanded = numerics.compute * config.hidden_size * widest if step.bits == "4bit" else 0
    flow = batch.size * (2 * config.hidden_size * numerics.stream + 3 * numerics.compute * widest) + expanded
    if step.execution.attention == "eager":
        flow += batch.size * batch.tokens * config.num_heads * (_FLOAT32 + numerics.compute)
    free = None if free_bytes is None else free_bytes - flow
    loss = flow + head_bytes(
        config, num_tokens=batch.size, numerics=numerics, head=step.execution.head, free_bytes=free
    )
    per_token = sum(2 * numerics.compute * layer.num_kv_heads * layer.head_dim for layer in config.layers)
    cache = batch.rows * (batch.tokens + answer_tokens) * per_token
    answers = flow + cache + batch.rows * config.vocab_size * 2 * _FLOAT32
    return max(loss, answers) if answer_tokens else loss
