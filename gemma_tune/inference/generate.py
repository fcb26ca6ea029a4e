"""Answers from a model: batched, left-padded, order kept (LEAF)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default, temperature 0, is greedy and deterministic."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: what was generated, without special tokens.
        num_tokens: generated tokens, the stop token included.
        stopped: whether the model stopped by itself; false when it reached `max_new_tokens`.
    """

    text: str
    num_tokens: int
    stopped: bool


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 8,
    sampling: Sampling | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    streamer: Any = None,
) -> list[Completion]:
    """Complete every prompt.

    Args:
        prompts: token ids of each prompt, BOS included; rows may differ in length.
        stop_token_ids: ids that end an answer.
        streamer: a transformers streamer for a single prompt.

    Returns:
        One completion a prompt, in the order of the prompts.
    """
    sampling = sampling or Sampling()
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    config = to_generation_config(
        sampling, stop_token_ids=stop_token_ids, pad_token_id=tokenizer.pad_token_id, max_new_tokens=max_new_tokens
    )
    completions: list[Completion | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        inputs = pad_left(
            [prompts[index] for index in chosen], pad_token_id=tokenizer.pad_token_id, device=model.device
        )
        with torch.no_grad():
            output = model.generate(**inputs, generation_config=config, streamer=streamer)
        for index, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            completions[index] = _to_completion(row, tokenizer=tokenizer, stop_token_ids=stop_token_ids)
        if on_progress is not None:
            on_progress(min(start + batch_size, len(prompts)), len(prompts))
    return [completion for completion in completions if completion is not None]


def to_generation_config(
    sampling: Sampling, *, stop_token_ids: Sequence[int], pad_token_id: int, max_new_tokens: int
) -> GenerationConfig:
    """Translate a `Sampling` into transformers' configuration."""
    chosen: dict[str, Any] = {}
    if sampling.temperature > 0:
        chosen = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
            "min_p": sampling.min_p,
        }
    return GenerationConfig(
        do_sample=sampling.temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
        repetition_penalty=sampling.repetition_penalty,
        **chosen,
    )


def pad_left(prompts: Sequence[Sequence[int]], *, pad_token_id: int, device: Any) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each [batch, longest prompt], every prompt ending in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, prompt in enumerate(prompts):
        input_ids[index, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[index, longest - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def _to_completion(row: list[int], *, tokenizer: Any, stop_token_ids: Sequence[int]) -> Completion:
    ends = [position for position, token in enumerate(row) if token in stop_token_ids]
    answer = row[: ends[0]] if ends else row
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Completion(text=text.strip(), num_tokens=len(answer) + bool(ends), stopped=bool(ends))
