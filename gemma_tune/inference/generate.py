"""Answers from a transformers model: batched, left-padded, order kept (LEAF)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TextStreamer

from gemma_tune.errors import DataError
from gemma_tune.inference.answer_settings import AnswerSettings, Sampler, Sampling
from gemma_tune.inference.streaming import OnProgress, OnText, StreamedText, cut_at_stop


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str  # what was generated, without special tokens, stop string and white space at its ends
    num_tokens: int  # generated tokens, the stop token included
    stopped: bool  # whether a stop token or stop string ended it; false when it reached its length


@dataclass(frozen=True)
class TransformersModel:
    """A transformers model, or the PEFT model around it, that completes prompts."""

    model: Any
    tokenizer: Any
    stop_token_ids: Sequence[int]  # ids that end an answer

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: AnswerSettings,
        *,
        on_progress: OnProgress | None = None,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: token ids of each prompt, BOS included; rows may differ in length.
            on_progress: is called with the number of finished prompts and of all, after each batch.
            on_text: gets the answer piece by piece; for a single prompt, without beams.

        Returns:
            One completion a prompt, in the order of the prompts.

        Raises:
            DataError: a prompt leaves no room for an answer, or the user's own sampler fails.
        """
        model, tokenizer, sampling, stop_strings = self.model, self.tokenizer, settings.sampling, settings.stop_strings
        budgets = answer_budgets(
            prompts, settings, context_tokens=model.config.get_text_config().max_position_embeddings
        )
        streamer = None
        if on_text is not None and sampling.num_beams == 1:
            streamer = WordStreamer(tokenizer, on_text, stop_strings)
        completions: list[Completion | None] = [None] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        with seeded(sampling.seed):
            for start in range(0, len(by_length), settings.batch_size):
                chosen = by_length[start : start + settings.batch_size]
                inputs = pad_left(
                    [prompts[index] for index in chosen], pad_token_id=tokenizer.pad_token_id, device=model.device
                )
                config = to_generation_config(
                    settings,
                    max_new_tokens=max(budgets[index] for index in chosen),
                    stop_token_ids=self.stop_token_ids,
                    pad_token_id=tokenizer.pad_token_id,
                )
                with torch.no_grad():
                    output = model.generate(
                        **inputs,
                        generation_config=config,
                        logits_processor=custom_processors(sampling),
                        streamer=streamer,
                        tokenizer=tokenizer if stop_strings else None,
                    )
                for index, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                    completions[index] = to_completion(
                        row[: budgets[index]],
                        tokenizer=tokenizer,
                        stop_token_ids=self.stop_token_ids,
                        stop_strings=stop_strings,
                    )
                if on_progress is not None:
                    on_progress(min(start + settings.batch_size, len(prompts)), len(prompts))
        return [completion for completion in completions if completion is not None]


def answer_budgets(prompts: Sequence[Sequence[int]], settings: AnswerSettings, *, context_tokens: int) -> list[int]:
    """How many tokens each answer may have.

    Raises:
        DataError: a prompt leaves no room for one.
    """
    longest, name = context_tokens, "the model's context"
    max_length = settings.max_length
    if max_length is not None and max_length < context_tokens:
        longest, name = max_length, "the longest length allowed"
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= longest:
            which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise DataError(
                f"{which} has {len(prompt):,} tokens, which leaves no room for an answer: {name} is {longest:,} tokens",
                hint="shorten the prompt" + (", or raise the length" if longest == max_length else ""),
            )
    return [min(settings.longest_answer, longest - len(prompt)) for prompt in prompts]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Make the draws of a block follow from `seed`, and leave the caller's random numbers alone; None does nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def to_generation_config(
    settings: AnswerSettings, *, max_new_tokens: int, stop_token_ids: Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """Translate the settings of an answer into transformers' configuration.

    What is drawn sets every filter: one that is left out would be taken from the model's own generation_config.json.
    """
    sampling = settings.sampling
    drawn: dict[str, Any] = {}
    if sampling.is_drawn:
        drawn = {
            # A function of the user's own gets logits that are divided already; see `custom_processors`.
            "temperature": 1.0 if sampling.custom is not None else sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
            "min_p": sampling.min_p,
        }
    return GenerationConfig(
        do_sample=sampling.is_drawn,
        num_beams=sampling.num_beams,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
        stop_strings=list(settings.stop_strings) or None,
        **drawn,
    )


def custom_processors(sampling: Sampling) -> LogitsProcessorList:
    """The user's own sampler as a logits processor, behind the temperature; empty where there is none."""
    if sampling.custom is None:
        return LogitsProcessorList()
    chosen = _CustomSampler(sampling.custom, name=sampling.custom_name or "sampler")
    if sampling.temperature in (0.0, 1.0):
        return LogitsProcessorList([chosen])
    return LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature), chosen])


def pad_left(prompts: Sequence[Sequence[int]], *, pad_token_id: int, device: Any) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each [batch, longest prompt], every prompt ending in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, prompt in enumerate(prompts):
        input_ids[index, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[index, longest - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def to_completion(
    row: list[int], *, tokenizer: Any, stop_token_ids: Sequence[int], stop_strings: Sequence[str]
) -> Completion:
    """The completion of a generated row, behind whose end there may be padding."""
    end = next((position for position, token in enumerate(row) if token in stop_token_ids), None)
    answer = row if end is None else row[:end]
    while answer and answer[-1] == tokenizer.pad_token_id:
        answer = answer[:-1]
    text, at_stop_string = cut_at_stop(tokenizer.decode(answer, skip_special_tokens=True), stop_strings)
    return Completion(
        text=text.strip(), num_tokens=len(answer) + (end is not None), stopped=end is not None or at_stop_string
    )


class WordStreamer(TextStreamer):
    """transformers' streamer, which gives whole words, into `on_text` instead of stdout."""

    def __init__(self, tokenizer: Any, on_text: OnText, stop_strings: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.streamed = StreamedText(on_text, stop_strings)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.streamed.add(text, is_last=stream_end)


class _CustomSampler(LogitsProcessor):
    """A user's own sampler: token ids become logits of which only that token can be drawn."""

    def __init__(self, function: Sampler, *, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        batch_size, vocab_size = scores.shape
        try:
            chosen = torch.as_tensor(self.function(scores.clone()), device=scores.device)
        except Exception as error:
            raise self._refused(f"raised {type(error).__name__}: {error}") from error
        if chosen.shape == scores.shape and chosen.is_floating_point():
            if chosen.isnan().any() or not chosen.isfinite().any(dim=-1).all():
                raise self._refused("gave logits that are NaN, or rows of which no token can be drawn")
            return chosen.to(scores.dtype)
        if chosen.shape == (batch_size,) and not (chosen.is_floating_point() or chosen.dtype == torch.bool):
            if ((chosen < 0) | (chosen >= vocab_size)).any():
                raise self._refused(f"gave the token id {int(chosen.max())} for a vocabulary of {vocab_size:,}")
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen.long()[:, None], 0.0)
        kind = str(chosen.dtype).removeprefix("torch.")
        raise self._refused(f"gave {kind} of shape {tuple(chosen.shape)} for logits of shape {tuple(scores.shape)}")

    def _refused(self, what: str) -> DataError:
        return DataError(
            f"the sampler {self.name} {what}",
            hint="from logits [batch, vocabulary] it returns integer token ids [batch], or logits of the same shape",
        )
