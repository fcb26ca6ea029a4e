"""The parts of a plan: what lies on the card, in the host's memory and on the disk, each with its formula."""

import functools
from dataclasses import replace

from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import count_params, list_rows
from gemma_tune.planning import memory
from gemma_tune.planning.activations import CHUNK_TOKENS, Activations, evaluation_bytes
from gemma_tune.planning.known_base import Base
from gemma_tune.planning.step import Batch, Step
from gemma_tune.planning.verdict import LOADING_BYTES, Part
from gemma_tune.recipe.schema import Recipe

_PROCESS_HOST_BYTES = 3_000_000_000
_MAX_SHARD_BYTES = 5_000_000_000
_TOKENIZER_BYTES = 40_000_000
# llama.cpp's block formats: bytes and weights of a block.
_Q4_K, _Q5_K, _Q6_K, _Q8_0 = 144 / 256, 176 / 256, 210 / 256, 34 / 32


def resident_parts(recipe: Recipe, *, base: Base, step: Step, processes: int) -> tuple[Part, ...]:
    """Count what lies on the card from the first step to the last."""
    config, bits, numerics = base.config, step.bits, step.numerics
    name, optimizer = recipe.training.optimizer, memory.OPTIMIZERS[recipe.training.optimizer]
    quantized = memory.quantized_bytes(config, bits=bits)
    state = memory.optimizer_bytes(config, step.lora, optimizer=name)
    parts = [
        Part(
            "weights in 4 bits" if bits == "4bit" else "weights in 8 bits",
            quantized,
            "4.127 bits a weight: NF4, blocks of 64, double quantisation (arXiv:2305.14314)"
            if bits == "4bit"
            else "1 byte a weight, 4 an output (arXiv:2208.07339)",
        ),
        Part(
            "embeddings, norms" if bits != "plain" else "weights",
            memory.unquantized_bytes(config, bits=bits, numerics=numerics),
            f"{numerics.stream} bytes a parameter; neither engine quantises them",
        ),
        Part(
            "image and audio towers",
            memory.tower_bytes(base.num_tower_params, bits=bits, engine=step.execution.engine),
            "loaded, never trained",
        ),
        Part("adapter", memory.adapter_bytes(config, step.lora), "r·(in + out) a target, float32"),
        Part("gradients", memory.gradient_bytes(config, step.lora), "float32, of the adapter alone"),
        Part(
            "buckets of gradients",
            memory.gradient_bytes(config, step.lora) if processes > 1 else 0,
            "DDP sums the gradients of all cards in a copy of them",
        ),
        Part(f"{name} state", 0 if optimizer.is_paged else state, optimizer.how),
        Part("left by loading", LOADING_BYTES, "what loaders leave reserved in four published runs"),
    ]
    return tuple(part for part in parts if part.bytes or part.name.endswith("state"))


def moment_parts(
    recipe: Recipe, *, config: TextConfig, step: Step, found: Activations, free_bytes: int | None
) -> tuple[Part, ...]:
    """Count what comes on top at each moment of a run that may be its peak; `free_bytes` as in `activations`."""
    how = {
        "off": "every layer's tensors, and gradients in flight",
        "on": "every layer's input, one layer computed again, gradients in flight",
        "offload": "layer inputs on the host, one layer computed again, gradients in flight",
    }
    head_how = {
        "chunked": f"logits of {CHUNK_TOKENS} tokens × {config.vocab_size:,} (TRL's chunked loss)",
        "fused": f"logits × {config.vocab_size:,} in chunks of at most half the free memory (Unsloth)",
    }
    foreach = recipe.training.optimizer == "adamw"
    moments = [
        Part("backward pass", found.backward, how[step.execution.checkpointing]),
        Part("head and loss", found.head, head_how[step.execution.head]),
        Part(
            "optimizer step",
            memory.adapter_bytes(config, step.lora) if foreach else 0,
            "a copy of the adapter (PyTorch's foreach kernels)" if foreach else "in place",
        ),
        Part("saving", 0, "the adapter is copied to the host"),
    ]
    data = recipe.data
    if data.eval_source or data.eval_split or data.eval_fraction:
        is_answering = recipe.evaluation.exact_match or recipe.evaluation.num_questions > 0
        answers = recipe.evaluation.max_new_tokens if is_answering else 0
        rows = recipe.evaluation.batch_size or recipe.training.batch_size
        batch = Batch(rows * recipe.method_facts.sequences_per_row, recipe.data.max_seq_tokens)
        moments.insert(
            2,
            Part(
                "evaluation",
                evaluation_bytes(config, replace(step, batch=batch), answer_tokens=answers, free_bytes=free_bytes),
                f"batch of {batch.rows}: one layer's tensors, loss or keys and values of answers",
            ),
        )
    return tuple(moments)


def host_parts(recipe: Recipe, *, base: Base, step: Step, found: Activations) -> tuple[Part, ...]:
    """Count the host's memory."""
    whole = 2 * (count_params(base.config) + base.num_tower_params)
    parts = [
        Part("process", _PROCESS_HOST_BYTES, "Python, PyTorch, CUDA libraries; not measured on a card"),
        Part("loading", min(whole, _MAX_SHARD_BYTES), "one file of weights at a time"),
        Part("layer inputs", found.offloaded, "L·T·H, pinned (gradient_checkpointing: unsloth)"),
    ]
    if memory.OPTIMIZERS[recipe.training.optimizer].is_paged:
        state = memory.optimizer_bytes(base.config, step.lora, optimizer=recipe.training.optimizer)
        parts.append(Part("paged optimizer state", state, "managed memory"))
    return tuple(part for part in parts if part.bytes)


def disk_parts(recipe: Recipe, *, base: Base, step: Step) -> tuple[Part, ...]:
    """Count what a run writes, with the exports that the recipe asks for."""
    adapter = memory.adapter_bytes(base.config, step.lora)
    state = memory.optimizer_bytes(base.config, step.lora, optimizer=recipe.training.optimizer)
    num_params = count_params(base.config) + base.num_tower_params
    # The newest is written before the oldest is removed.
    kept = recipe.training.keep_checkpoints + 1
    parts = [
        Part("download", 0 if base.is_local else 2 * num_params + _TOKENIZER_BYTES, "2 bytes a parameter, once"),
        Part(
            f"{kept} checkpoints",
            kept * (adapter + state + _TOKENIZER_BYTES),
            "adapter, optimizer state and tokenizer each",
        ),
        Part("adapter", adapter + _TOKENIZER_BYTES, "with its tokenizer"),
    ]
    wanted = [part for part in export_parts(recipe, base=base) if part.name in recipe.export.formats]
    return tuple(part for part in [*parts, *wanted] if part.bytes)


def export_parts(recipe: Recipe, *, base: Base) -> tuple[Part, ...]:
    """Estimate each export from the architecture; an export itself reads the headers of files that need not be here."""
    element = 4 if recipe.export.dtype == "float32" else 2
    num_params = count_params(base.config) + base.num_tower_params
    merged = Part("merged-16bit", element * num_params + _TOKENIZER_BYTES, f"{element} bytes a parameter")
    return (merged, *_gguf(base.config))


@functools.cache
def _gguf(config: TextConfig) -> tuple[Part, ...]:
    """Sizes of the text model. The mixtures of llama.cpp keep the embedding and half of v and down in Q6_K."""
    total = embedding = sixes = 0
    for row in list_rows(config):
        total += row.num_params
        if row.kind == "Embedding":
            embedding += row.num_params
        elif row.name.endswith(("v_proj", "down_proj")):
            sixes += row.num_params // 2
    rest = total - embedding - sixes
    mixed = (embedding + sixes) * _Q6_K
    sizes = {
        "f16": total * 2.0,
        "q8_0": total * _Q8_0,
        "q6_k": total * _Q6_K,
        "q5_k_m": mixed + rest * _Q5_K,
        "q4_k_m": mixed + rest * _Q4_K,
    }
    return tuple(Part(f"gguf-{name}", round(size), "llama.cpp's block formats") for name, size in sizes.items())
