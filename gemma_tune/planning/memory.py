"""Bytes of weights, adapter, gradients and optimizer state on one card: exact counts from the architecture.

Each function names the formula and its source. Symbols: r LoRA rank; s bytes of the residual stream.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from gemma_tune.engines.engine_facts import EngineFacts
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import LayerRow, count_params, count_weight_bytes, list_rows, select_lora_rows
from gemma_tune.planning.step import Bits, Numerics
from gemma_tune.recipe.schema import LoraSection

Shapes = tuple[tuple[int, ...], ...]

_FLOAT32 = 4
# bitsandbytes: 8-bit state of tensors from 4,096 elements, one float32 absmax a block of 256, a table of 256 float32
# for each of the moments, shared by all tensors; paging from 100,000 elements.
_8BIT_MIN_ELEMENTS = 4096
_8BIT_BLOCK = 256
_8BIT_TABLE_BYTES = 256 * _FLOAT32


def is_quantized(row: LayerRow) -> bool:
    """Both engines quantise every linear layer but the head (transformers' and Unsloth's lists of skipped modules)."""
    return row.kind == "Linear" and row.name != "lm_head"


@functools.cache
def quantized_bytes(config: TextConfig, *, bits: Bits) -> int:
    """Bytes of the linear layers that the engine quantises; 0 for "plain".

    4bit: 0.5 bytes a weight, one byte of absmax a block of 64, one float32 a 256 of those, three small tables a matrix:
    4.127 bits a weight (QLoRA, arXiv:2305.14314, section 3; bitsandbytes' Params4bit with compress_statistics).
    8bit: one byte a weight and one float32 an output feature (LLM.int8(), arXiv:2208.07339).
    """
    rows = [row for row in list_rows(config) if is_quantized(row)]
    if bits == "4bit":
        rest = count_params(config) - sum(math.prod(row.weight_shape) for row in rows)
        return count_weight_bytes(config, load="4bit") - 2 * rest
    if bits == "8bit":
        return sum(math.prod(row.weight_shape) + _FLOAT32 * row.weight_shape[0] for row in rows)
    return 0


@functools.cache
def unquantized_bytes(config: TextConfig, *, bits: Bits, numerics: Numerics) -> int:
    """Embeddings, head, norms (and with "plain" the linear layers) in the storage type: s bytes a parameter."""
    kept = count_params(config)
    if bits != "plain":
        kept -= sum(math.prod(row.weight_shape) for row in list_rows(config) if is_quantized(row))
    return kept * numerics.stream


def tower_bytes(num_params: int, *, bits: Bits, engine: EngineFacts) -> int:
    """Image and audio towers of a multimodal checkpoint, which are loaded and never trained."""
    if engine.quantizes_towers and bits != "plain":
        return round(num_params * (4.127 / 8 if bits == "4bit" else 1))
    return 2 * num_params


@functools.cache
def trained_shapes(config: TextConfig, lora: LoraSection) -> Shapes:
    """Shapes of the trained tensors: A (r, in) and B (out, r) of each target (arXiv:2106.09685, section 4.1), a
    magnitude (out) with DoRA (arXiv:2402.09353), and whole modules."""
    shapes: list[tuple[int, ...]] = []
    for row in select_lora_rows(config, lora.targets):
        size_out, size_in = row.weight_shape
        shapes += [(lora.rank, size_in), (size_out, lora.rank)]
        if lora.use_dora:
            shapes.append((size_out,))
    for name in lora.modules_to_save:
        shapes += [
            row.weight_shape for row in list_rows(config) if row.name.rsplit(".", 1)[-1] == name and row.weight_shape
        ]
    return tuple(shapes)


def count_trained(config: TextConfig, lora: LoraSection) -> int:
    return sum(math.prod(shape) for shape in trained_shapes(config, lora))


def adapter_bytes(config: TextConfig, lora: LoraSection) -> int:
    """Trained weights are float32 whatever the base computes in (engines/lora.py): 4 bytes each."""
    return _FLOAT32 * count_trained(config, lora)


def gradient_bytes(config: TextConfig, lora: LoraSection) -> int:
    """A gradient has the type of its weight: 4 bytes for each trained one, none for frozen ones."""
    return adapter_bytes(config, lora)


def optimizer_bytes(config: TextConfig, lora: LoraSection, *, optimizer: str) -> int:
    """State of an optimizer, by the rule that its row of OPTIMIZERS names; sgd has no momentum here."""
    return OPTIMIZERS[optimizer].state(trained_shapes(config, lora))


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


@dataclass(frozen=True)
class Optimizer:
    """Bytes of an optimizer's state by the shapes of what it trains, in words, and whether it is paged."""

    state: Callable[[Shapes], int]
    how: str
    is_paged: bool = False


_PAGES = "pages to the host when the card is full"  # managed memory, which the driver moves
OPTIMIZERS = {
    "adamw": Optimizer(functools.partial(_full, 2), "2 moments in float32 (arXiv:1711.05101)"),
    "adamw_fused": Optimizer(functools.partial(_full, 2), "2 moments in float32 (arXiv:1711.05101)"),
    "paged_adamw": Optimizer(functools.partial(_full, 2), _PAGES, is_paged=True),
    "adamw_8bit": Optimizer(functools.partial(_blockwise, 2), "2 moments in 8 bits, blocks of 256 (arXiv:2110.02861)"),
    "paged_adamw_8bit": Optimizer(functools.partial(_blockwise, 2), _PAGES, is_paged=True),
    "lion_8bit": Optimizer(functools.partial(_blockwise, 1), "1 moment in 8 bits, blocks of 256 (arXiv:2302.06675)"),
    "adafactor": Optimizer(_factored, "a row and a column a matrix (arXiv:1804.04235)"),
    "sgd": Optimizer(functools.partial(_full, 0), "none"),
}
