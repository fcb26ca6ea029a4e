"""Bytes of a training step by part, counted from the architecture; each function names the formula and its source.

Two kinds of numbers: weights, adapter, gradients and optimizer state are exact counts. Activations follow from what
each operation keeps for its backward pass, which the tests measure on tiny Gemmas; what lives in between is a bound
with the coefficients that such measurements gave. Everything is for one card.

Symbols: T tokens of a batch (rows · tokens a row), S tokens a row, H hidden size, I FFN width, V vocabulary, r LoRA
rank, L layers; a bytes of the compute type, s bytes of the residual stream.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gemma_tune.engines.facts import Checkpointing, EngineFacts, Head
from gemma_tune.models.config import LayerShape, TextConfig
from gemma_tune.models.describe import LayerRow, count_weight_bytes, select_lora_rows, summarize

Bits = Literal["4bit", "8bit", "plain"]
Attention = Literal["sdpa", "eager", "flash"]
Shapes = tuple[tuple[int, ...], ...]

_GIB = 2**30
_FLOAT32 = 4
# trl 1.14 computes the head and the loss in checkpointed chunks of this many supervised tokens
# (trl.trainer.sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE).
CHUNK_TOKENS = 256
# unsloth_zoo.fused_losses: bytes a logit that it reckons with; a chunk gets half of what is free, at most 4 GiB.
_FUSED_BYTES_PER_LOGIT = 16
_FUSED_MAX_BYTES = 4 * _GIB
_FUSED_SHARE = 0.5
# bitsandbytes: 8-bit state of tensors from 4,096 elements, one float32 absmax a block of 256, a table of 256 float32
# for each of the moments, shared by all tensors; paging from 100,000 elements.
_8BIT_MIN_ELEMENTS = 4096
_8BIT_BLOCK = 256
_8BIT_TABLE_BYTES = 256 * _FLOAT32
# Modules that get their input from a norm: it is there once for all of them, unless it has to be cast for each.
_NORM_INPUTS = ("layernorm", "feedforward_layernorm")


@dataclass(frozen=True)
class Numerics:
    """Bytes of the number types in a step.

    Attributes:
        compute: of matrix products.
        stream: of embeddings, norms and the residual stream.
        autocast: trained float32 weights are copied to the compute type for a step.
        casts_inputs: PEFT casts the input of every adapter by itself. It does where `torch.is_autocast_enabled()` is
            false, so never on a card that trains in 16 bits (peft/tuners/lora/bnb.py).
        dropout_mask: a mask element, 1 on CUDA (bool).
    """

    compute: int
    stream: int
    autocast: bool
    casts_inputs: bool = False
    dropout_mask: int = 1


@dataclass(frozen=True)
class Adapter:
    """LoRA: rank, targets, dropout; `dora` keeps two outputs more a target; `saved` are modules trained as a whole."""

    rank: int
    targets: tuple[str, ...]
    dropout: float = 0.0
    dora: bool = False
    saved: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once: `rows` of `tokens`, and whether padding needs a mask."""

    rows: int
    tokens: int
    padded: bool = True

    @property
    def size(self) -> int:
        return self.rows * self.tokens


@dataclass(frozen=True)
class Execution:
    """How the engine computes a step: whose code, which attention, what is recomputed, how the loss is taken."""

    engine: EngineFacts
    attention: Attention
    checkpointing: Checkpointing
    head: Head

    def fuses(self, config: TextConfig) -> bool:
        """Whether the engine has a hand-written backward pass for this family; others run transformers' code."""
        return config.family in self.engine.fused_families


# --- weights, adapter, gradients, optimizer ---------------------------------------------------------------------------


@functools.cache
def count_all(config: TextConfig) -> int:
    """Parameters of the text model."""
    return sum(row.num_params for row in _rows(config))


@functools.cache
def _rows(config: TextConfig) -> tuple[LayerRow, ...]:
    return tuple(summarize(config))


def _is_quantized(row: LayerRow) -> bool:
    """Both engines quantise every linear layer but the head (transformers' and Unsloth's lists of skipped modules)."""
    return row.kind == "Linear" and row.name != "lm_head"


@functools.cache
def quantized_bytes(config: TextConfig, *, bits: Bits) -> int:
    """Bytes of the linear layers that the engine quantises; 0 for "plain".

    4bit: 0.5 bytes a weight, one byte of absmax a block of 64, one float32 a 256 of those, three small tables a matrix:
    4.127 bits a weight (QLoRA, arXiv:2305.14314, section 3; bitsandbytes' Params4bit with compress_statistics).
    8bit: one byte a weight and one float32 an output feature (LLM.int8(), arXiv:2208.07339).
    """
    rows = [row for row in _rows(config) if _is_quantized(row)]
    if bits == "4bit":
        rest = count_all(config) - sum(math.prod(row.weight_shape) for row in rows)
        return count_weight_bytes(config, load="4bit") - 2 * rest
    if bits == "8bit":
        return sum(math.prod(row.weight_shape) + _FLOAT32 * row.weight_shape[0] for row in rows)
    return 0


@functools.cache
def unquantized_bytes(config: TextConfig, *, bits: Bits, numerics: Numerics) -> int:
    """Embeddings, head, norms (and with "plain" the linear layers) in the storage type: s bytes a parameter."""
    kept = count_all(config)
    if bits != "plain":
        kept -= sum(math.prod(row.weight_shape) for row in _rows(config) if _is_quantized(row))
    return kept * numerics.stream


def tower_bytes(num_params: int, *, bits: Bits, engine: EngineFacts) -> int:
    """Image and audio towers of a multimodal checkpoint, which are loaded and never trained."""
    if engine.quantizes_towers and bits != "plain":
        return round(num_params * (4.127 / 8 if bits == "4bit" else 1))
    return 2 * num_params


@functools.cache
def trained_shapes(config: TextConfig, adapter: Adapter) -> Shapes:
    """Shapes of the trained tensors: A (r, in) and B (out, r) of each target (arXiv:2106.09685, section 4.1), a
    magnitude (out) with DoRA (arXiv:2402.09353), and whole modules."""
    shapes: list[tuple[int, ...]] = []
    for row in select_lora_rows(config, adapter.targets):
        size_out, size_in = row.weight_shape
        shapes += [(adapter.rank, size_in), (size_out, adapter.rank)]
        if adapter.dora:
            shapes.append((size_out,))
    for name in adapter.saved:
        shapes += [
            row.weight_shape for row in _rows(config) if row.name.rsplit(".", 1)[-1] == name and row.weight_shape
        ]
    return tuple(shapes)


def count_trained(config: TextConfig, adapter: Adapter) -> int:
    return sum(math.prod(shape) for shape in trained_shapes(config, adapter))


def adapter_bytes(config: TextConfig, adapter: Adapter) -> int:
    """Trained weights are float32 whatever the base computes in (engines/lora.py): 4 bytes each."""
    return _FLOAT32 * count_trained(config, adapter)


def gradient_bytes(config: TextConfig, adapter: Adapter) -> int:
    """A gradient has the type of its weight: 4 bytes for each trained one, none for frozen ones."""
    return adapter_bytes(config, adapter)


def optimizer_bytes(config: TextConfig, adapter: Adapter, *, optimizer: str) -> int:
    """State of an optimizer.

    adamw, adamw_fused, paged_adamw: two float32 moments (arXiv:1711.05101). adamw_8bit, paged_adamw_8bit: the same in
    8 bits with block-wise absmax (arXiv:2110.02861). lion_8bit: one such moment (arXiv:2302.06675). adafactor: a row
    and a column of second moments a matrix (arXiv:1804.04235). sgd: none without momentum.
    """
    return _STATE[optimizer](trained_shapes(config, adapter))


def _full(moments: int, shapes: Shapes) -> int:
    return moments * _FLOAT32 * sum(math.prod(shape) for shape in shapes)


def _blockwise(moments: int, shapes: Shapes) -> int:
    large = [math.prod(shape) for shape in shapes if math.prod(shape) >= _8BIT_MIN_ELEMENTS]
    small = tuple(shape for shape in shapes if math.prod(shape) < _8BIT_MIN_ELEMENTS)
    blocks = sum(size + _FLOAT32 * math.ceil(size / _8BIT_BLOCK) for size in large)
    return moments * (blocks + (_8BIT_TABLE_BYTES if large else 0)) + _full(moments, small)


def _factored(shapes: Shapes) -> int:
    # One number more a tensor: the root mean square of the weight.
    return _FLOAT32 * sum(sum(shape) + 1 for shape in shapes)


_STATE: dict[str, Callable[[Shapes], int]] = {
    "adamw": functools.partial(_full, 2),
    "adamw_fused": functools.partial(_full, 2),
    "paged_adamw": functools.partial(_full, 2),
    "adamw_8bit": functools.partial(_blockwise, 2),
    "paged_adamw_8bit": functools.partial(_blockwise, 2),
    "lion_8bit": functools.partial(_blockwise, 1),
    "adafactor": _factored,
    "sgd": functools.partial(_full, 0),
}
# Their state lies in managed memory, which the driver moves to the host when the card is full.
PAGED = ("paged_adamw", "paged_adamw_8bit")


# --- activations ------------------------------------------------------------------------------------------------------


def layer_saved_bytes(
    config: TextConfig, index: int, *, batch: Batch, numerics: Numerics, adapter: Adapter, execution: Execution
) -> int:
    """Bytes that decoder layer `index` keeps for its backward pass.

    transformers' code: each norm keeps its input in float32 (4·H·T); attention keeps q, k, v and its output, and
    `eager` the scores as well; GeGLU keeps gate, gelu(gate) and up (3·a·I·T); each adapter keeps its input, where it is
    not kept already, and its r activations. Unsloth's kernels for Gemma 1 and 2 (unsloth/kernels/fast_lora.py,
    rms_layernorm.py): a norm its input in the stream's type, QKV and MLP theirs, and gate and up; nothing else.
    """
    layer = config.layers[index]
    rows = _layer_rows(config, index)
    attention = _attention_bytes(config, layer, batch=batch, numerics=numerics, execution=execution)
    if execution.fuses(config):
        norms = sum(numerics.stream * row.weight_shape[0] + _FLOAT32 for row in rows if row.kind == "RMSNorm")
        inputs = 2 * numerics.compute * config.hidden_size
        return attention + batch.size * (norms + inputs + 2 * numerics.compute * layer.intermediate_size)
    norms = sum(_FLOAT32 * (row.weight_shape[0] + 1) * _heads(row) for row in rows if row.kind == "RMSNorm")
    mlp = 3 * numerics.compute * layer.intermediate_size
    experts = 4 * numerics.compute * config.expert_intermediate_size * config.num_experts_per_token
    saved = attention + batch.size * (norms + mlp + experts)
    saved += batch.size * _adapter_bytes_per_token(config, rows, numerics, adapter, execution)
    return saved + _cast_weight_bytes(config, rows, numerics, adapter)


@functools.cache
def _layer_rows(config: TextConfig, index: int) -> tuple[LayerRow, ...]:
    return tuple(row for row in _rows(config) if row.name.startswith(f"model.layers.{index}."))


def _heads(row: LayerRow) -> int:
    """Vectors a token that a norm works on: one, or one a head."""
    return row.output_shape[2] or 1 if len(row.output_shape) == 4 else 1


def _attention_bytes(
    config: TextConfig, layer: LayerShape, *, batch: Batch, numerics: Numerics, execution: Execution
) -> int:
    """q: a·heads·d; k, v: a·kv heads·d each, or a·heads·d where transformers repeats them (eager, sdpa with a mask).
    sdpa, flash: the output, a float32 a head for the softmax's sum, and a·S for a mask. eager: softmax in float32 and
    in the compute type, and tanh where scores are capped: heads·S·(4 + a [if a < 4] + a)."""
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


def _adapter_bytes_per_token(
    config: TextConfig, rows: tuple[LayerRow, ...], numerics: Numerics, adapter: Adapter, execution: Execution
) -> int:
    """Inputs and rank-r activations of the adapters of a layer; see `Numerics.casts_inputs` for who shares an input."""
    chosen = _target_names(config, adapter.targets)
    total = 0
    counted: set[str] = set()
    for row in rows:
        if row.name not in chosen:
            continue
        size_out, size_in = row.weight_shape
        total += numerics.compute * adapter.rank
        if adapter.dora:
            total += 2 * numerics.compute * size_out
        if adapter.dropout:
            total += size_in * (numerics.compute + numerics.dropout_mask)
            continue
        from_norm = row.connected_to.endswith(_NORM_INPUTS)
        own_copy = numerics.compute < _FLOAT32 and (
            numerics.casts_inputs or (from_norm and numerics.stream != numerics.compute)
        )
        # The output of attention is kept by attention itself; o_proj reads it where it lies.
        is_there = row.connected_to.startswith("attention") and execution.attention != "eager"
        if own_copy or (row.connected_to not in counted and not is_there):
            total += numerics.compute * size_in
        counted.add(row.connected_to)
    return total


def _cast_weight_bytes(config: TextConfig, rows: tuple[LayerRow, ...], numerics: Numerics, adapter: Adapter) -> int:
    """Autocast's 16-bit copies of A and B, which live as long as the graph does."""
    if not numerics.autocast:
        return 0
    chosen = _target_names(config, adapter.targets)
    return numerics.compute * adapter.rank * sum(sum(row.weight_shape) for row in rows if row.name in chosen)


@functools.cache
def _target_names(config: TextConfig, targets: tuple[str, ...]) -> frozenset[str]:
    return frozenset(row.name for row in select_lora_rows(config, targets))


@dataclass(frozen=True)
class Activations:
    """Bytes on the card beyond weights and their like, at the moments of a step that can be its peak.

    Attributes:
        stored: what the forward pass leaves: every layer's tensors, or with checkpointing every layer's input; and the
            final norm's, and masks.
        masks: of `stored`, what no operation keeps for its backward pass.
        head: at the head and loss: `stored`, the hidden states with their gradient, and the logits.
        backward: in a layer's backward pass: `stored`, the layer computed again, and gradients in flight.
        offloaded: layer inputs in pinned host memory.
    """

    stored: int
    masks: int
    head: int
    backward: int
    offloaded: int


def activations(
    config: TextConfig,
    *,
    batch: Batch,
    numerics: Numerics,
    adapter: Adapter,
    execution: Execution,
    bits: Bits,
    free_bytes: int | None = None,
) -> Activations:
    """Activations of a training step. `free_bytes` is what weights and their like leave of the card: Unsloth's fused
    loss sizes its chunks by it."""
    num_layers = len(config.layers)
    # Layers of one shape cost the same: each shape is counted once, at the first layer that has it.
    kinds = Counter(config.layers)
    first = {layer: config.layers.index(layer) for layer in kinds}
    saved = {
        layer: layer_saved_bytes(config, index, batch=batch, numerics=numerics, adapter=adapter, execution=execution)
        for layer, index in first.items()
    }
    in_flight = {
        layer: _in_flight_bytes(config, index, batch=batch, numerics=numerics, execution=execution, bits=bits)
        for layer, index in first.items()
    }
    hidden = batch.size * config.hidden_size * numerics.stream
    final_norm = batch.size * _FLOAT32 * (config.hidden_size + 1)
    masks = _mask_bytes(config, batch=batch, execution=execution, numerics=numerics)
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


def _mask_bytes(config: TextConfig, *, batch: Batch, execution: Execution, numerics: Numerics) -> int:
    """Attention masks, [rows, 1, S, S], shared by all layers; one for each kind of attention that the model has.

    eager: in the compute type. sdpa: one byte an element, and only where something besides the future is hidden:
    padding, or what lies before a window.
    """
    if execution.attention == "flash" or execution.fuses(config):
        return 0
    kinds = 1 + (0 < config.num_sliding_layers < len(config.layers))
    elements = batch.size * batch.tokens
    if execution.attention == "eager":
        return kinds * elements * numerics.compute
    if batch.padded:
        return kinds * elements
    return elements if config.sliding_window is not None and config.sliding_window < batch.tokens else 0


def _in_flight_bytes(
    config: TextConfig, index: int, *, batch: Batch, numerics: Numerics, execution: Execution, bits: Bits
) -> int:
    """Gradients and expanded weights of a layer's backward pass, at its larger moment.

    MLP: the gradients of two of its three wide tensors (one in Unsloth's kernels, which overwrite gate and up), those
    of the residual stream, and the widest weight in the compute type. Attention, when the MLP's tensors are gone: with
    `eager` the gradient of the scores in float32. Coefficients: measured, see tests.
    """
    layer = config.layers[index]
    fused = execution.fuses(config)
    norms = _FLOAT32 if config.facts.has_post_norms and not fused else 0
    stream = (2 * numerics.stream + norms) * config.hidden_size
    wide = (1 if fused else 2) * numerics.compute * layer.intermediate_size
    expanded = 0
    if bits == "4bit":
        shapes = [math.prod(row.weight_shape) for row in _layer_rows(config, index) if _is_quantized(row)]
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


def evaluation_bytes(
    config: TextConfig,
    *,
    batch: Batch,
    numerics: Numerics,
    execution: Execution,
    bits: Bits,
    answer_tokens: int,
    free_bytes: int | None = None,
) -> int:
    """The larger of the eval loss and of answering: no layer keeps anything.

    Loss: the residual stream twice, three wide tensors of one layer, its weight expanded, and the head as in training.
    Answers: keys and values of every layer, 2·a·kv heads·d a token, and the logits of the last token in float32.
    """
    widest = max(layer.intermediate_size for layer in config.layers)
    expanded = numerics.compute * config.hidden_size * widest if bits == "4bit" else 0
    flow = batch.size * (2 * config.hidden_size * numerics.stream + 3 * numerics.compute * widest) + expanded
    if execution.attention == "eager":
        flow += batch.size * batch.tokens * config.num_heads * (_FLOAT32 + numerics.compute)
    free = None if free_bytes is None else free_bytes - flow
    loss = flow + head_bytes(config, num_tokens=batch.size, numerics=numerics, head=execution.head, free_bytes=free)
    per_token = sum(2 * numerics.compute * layer.num_kv_heads * layer.head_dim for layer in config.layers)
    cache = batch.rows * (batch.tokens + answer_tokens) * per_token
    answers = flow + cache + batch.rows * config.vocab_size * 2 * _FLOAT32
    return max(loss, answers) if answer_tokens else loss
