"""LEAF. Pre-trains the weights of `gemma-tiny` from nothing on the documents of the closed world.

Weights and optimizer are float32, matrix products run in bfloat16 (autocast); the saved weights are bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer, GenerationConfig

from tools.tiny.documents import iter_documents
from tools.tiny.tokenizer import SPECIAL_IDS
from tools.tiny.world import World


@dataclass(frozen=True)
class PretrainSettings:
    """How long and how fast. The defaults made the shipped weights."""

    num_steps: int = 2800
    batch_rows: int = 8
    row_tokens: int = 256
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 1
    num_threads: int = 2


def tiny_config(vocab_size: int) -> GemmaConfig:
    """Return Gemma 1's architecture at about 2.8 M parameters.

    Widths are multiples of 256, so that GGUF's K-quants (blocks of 256 along a row) apply to every matrix.
    """
    return GemmaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_IDS["<pad>"],
        eos_token_id=SPECIAL_IDS["<eos>"],
        bos_token_id=SPECIAL_IDS["<bos>"],
    )


def iter_batches(world: World, tokenizer: GemmaTokenizer, *, settings: PretrainSettings) -> Iterator[torch.Tensor]:
    """Yield int64 tensors (batch_rows, row_tokens): a stream of `<bos> document <eos>`, cut into rows."""
    documents = iter_documents(world, seed=settings.seed)
    backend, num_needed = tokenizer.backend_tokenizer, settings.batch_rows * settings.row_tokens
    stream: list[int] = []
    while True:
        while len(stream) < num_needed:
            texts = [next(documents) for _ in range(64)]
            for encoding in backend.encode_batch(texts):
                stream += [*encoding.ids, SPECIAL_IDS["<eos>"]]
        yield torch.tensor(stream[:num_needed]).view(settings.batch_rows, settings.row_tokens)
        del stream[:num_needed]


def _optimizer(model: GemmaForCausalLM, settings: PretrainSettings) -> torch.optim.AdamW:
    """Weight decay is for matrices only: Gemma's norm weights are offsets from one."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak_learning_rate, betas=(0.9, 0.98), fused=True)


def _rate_factor(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def pretrain(
    world: World, tokenizer: GemmaTokenizer, *, settings: PretrainSettings, report: Callable[[str], None]
) -> GemmaForCausalLM:
    """Return the trained model in float32; `report` gets a line every 50 steps (loss in nats per token)."""
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    model = GemmaForCausalLM(tiny_config(len(tokenizer)))
    optimizer = _optimizer(model, settings)
    batches = iter_batches(world, tokenizer, settings=settings)
    started, losses = time.monotonic(), []
    model.train()
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_learning_rate * _rate_factor(step, settings)
        batch = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == settings.num_steps:
            seconds = time.monotonic() - started
            rate = (step + 1) * batch.numel() / seconds
            mean_loss = sum(losses) / len(losses)
            report(f"step {step + 1}/{settings.num_steps}  loss {mean_loss:.4f}  {rate:,.0f} tokens/s  {seconds:.0f} s")
            losses.clear()
    torch.use_deterministic_algorithms(False)
    return model.eval()


def write_model(model: GemmaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16)."""
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL_IDS["<bos>"],
        eos_token_id=[SPECIAL_IDS["<eos>"], SPECIAL_IDS["<end_of_turn>"]],
        pad_token_id=SPECIAL_IDS["<pad>"],
    )
    model.to(torch.bfloat16).save_pretrained(folder)
