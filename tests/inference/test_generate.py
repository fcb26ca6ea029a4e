"""Generation in batches against one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_tune.inference.generate import Sampling, generate_completions, pad_left, to_generation_config
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32).eval()


def test_batches_answer_as_single_prompts_in_the_given_order(model: torch.nn.Module) -> None:
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    texts = [
        "The",
        "In the town of Ostel there is",
        "A goat",
        "Once upon a time, in a green valley, a baker and a miller",
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    calls: list[tuple[int, int]] = []
    together = generate_completions(
        model,
        tokenizer,
        prompts,
        stop_token_ids=[1],
        max_new_tokens=12,
        batch_size=3,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    for prompt, completion in zip(prompts, together, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[1], pad_token_id=0
        )
        row = ids[0, len(prompt) :].tolist()
        assert completion.stopped == (1 in row)
        assert completion.text == tokenizer.decode(row, skip_special_tokens=True).strip()
        assert completion.num_tokens == len(row)
    assert calls == [(3, 4), (4, 4)]


def test_sampling_is_repeatable_by_its_seed(model: torch.nn.Module) -> None:
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    prompts = [tokenizer("A")["input_ids"]]

    def sample(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed)
        return generate_completions(
            model, tokenizer, prompts, stop_token_ids=[1], max_new_tokens=16, sampling=sampling
        )[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_left_padding() -> None:
    batch = pad_left([[2, 5], [2, 6, 7]], pad_token_id=0, device="cpu")
    assert batch["input_ids"].tolist() == [[0, 2, 5], [2, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_greedy_is_the_default() -> None:
    config = to_generation_config(Sampling(), stop_token_ids=[1, 107], pad_token_id=0, max_new_tokens=5)
    assert not config.do_sample
    assert config.eos_token_id == [1, 107]
    sampled = to_generation_config(Sampling(0.7, top_p=0.9), stop_token_ids=[1], pad_token_id=0, max_new_tokens=5)
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.7, 0.9, 0)
