"""Generation against transformers' own `generate`, in batches and one prompt at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from gemma_tune.errors import DataError
from gemma_tune.inference.answer_settings import AnswerSettings, Sampling
from gemma_tune.inference.generate import Completion, TransformersModel, pad_left, to_generation_config
from gemma_tune.inference.load_target import LoadedTarget
from gemma_tune.inference.sampling import choose_sampling, make_answer_settings

TEXTS = ["The", "In the town of Ostel there is", "A goat", "Once upon a time, in a green valley, a baker and a miller"]


@pytest.fixture(scope="module")
def prompts(tiny: LoadedTarget) -> list[list[int]]:
    return [tiny.tokenizer(text)["input_ids"] for text in TEXTS]


def oracle(tiny: LoadedTarget, prompt: list[int], *, seed: int = 0, **settings: Any) -> Completion:
    """What a user of transformers alone gets."""
    torch.manual_seed(seed)
    ids = tiny.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=24,
        eos_token_id=[1, 107], pad_token_id=0, **settings,
    )  # fmt: skip
    row = ids[0, len(prompt) :].tolist()
    stopped = row[-1] in (1, 107)
    return Completion(tiny.tokenizer.decode(row, skip_special_tokens=True).strip(), len(row), stopped)


def test_batches_answer_as_single_prompts_in_the_given_order(tiny: LoadedTarget, prompts: list[list[int]]) -> None:
    calls: list[tuple[int, int]] = []
    together = tiny.complete(
        prompts,
        AnswerSettings(max_new_tokens=24, batch_size=3),
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert together == [oracle(tiny, prompt, do_sample=False) for prompt in prompts]
    assert calls == [(3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"sampler": "beam", "num_beams": 3}, {"num_beams": 3, "do_sample": False}),
        ({"sampler": "random"}, {"do_sample": True, "top_k": 0}),
        ({"temperature": 1.5}, {"do_sample": True, "top_k": 0, "temperature": 1.5}),
        ({"top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"sampler": "top-k"}, {"do_sample": True, "top_k": 50}),
        ({"top_p": 0.8, "temperature": 0.7}, {"do_sample": True, "top_p": 0.8, "top_k": 0, "temperature": 0.7}),
        ({"min_p": 0.2}, {"do_sample": True, "min_p": 0.2, "top_k": 0}),
        ({"repetition_penalty": 1.3}, {"do_sample": False, "repetition_penalty": 1.3}),
    ],
    ids=str,
)
def test_samplers_equal_those_of_transformers(
    tiny: LoadedTarget, prompts: list[list[int]], asked: dict[str, Any], settings: dict[str, Any]
) -> None:
    for seed, prompt in enumerate(prompts[1:3]):
        (ours,) = tiny.complete([prompt], make_answer_settings(max_new_tokens=24, seed=seed, **asked))
        assert ours == oracle(tiny, prompt, seed=seed, **settings)


def test_a_seed_repeats_and_leaves_the_callers_random_numbers_alone(
    tiny: LoadedTarget, prompts: list[list[int]]
) -> None:
    def sample(seed: int) -> list[str]:
        settings = AnswerSettings(Sampling(temperature=1.5, seed=seed), max_new_tokens=16)
        return [each.text for each in tiny.complete(prompts, settings)]

    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    first = sample(1)
    assert torch.equal(torch.rand(3), wanted)
    assert sample(1) == first
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_the_models_own_settings_do_not_leak_in(tiny: LoadedTarget, prompts: list[list[int]]) -> None:
    """Gemma 3 comes with a generation_config.json that draws from 64 tokens."""
    model = copy.copy(tiny.model)
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, temperature=0.1)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        settings = AnswerSettings(sampling, max_new_tokens=12)
        ours = TransformersModel(model, tiny.tokenizer, [1, 107]).complete(prompts[:1], settings)
        assert ours == tiny.complete(prompts[:1], settings)


def test_a_sampler_of_ones_own(tiny: LoadedTarget, prompts: list[list[int]]) -> None:
    shapes: list[tuple[int, ...]] = []

    def likeliest(logits: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return logits.argmax(-1)

    def draw(**given: Any) -> list[Completion]:
        return tiny.complete(prompts, make_answer_settings(max_new_tokens=12, batch_size=4, seed=5, **given))

    assert draw(sampler=likeliest) == draw(sampler="greedy")
    assert set(shapes) == {(4, 2304)}
    assert draw(sampler=lambda logits: logits) == draw(sampler="random")
    assert draw(sampler=lambda logits: logits, temperature=2.0) == draw(temperature=2.0)
    assert draw(sampler=lambda logits: logits.argmax(-1).tolist()) == draw(sampler="greedy")


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        (lambda logits: logits[0], r"gave float32 of shape \(2304,\) for logits of shape \(1, 2304\)"),
        (lambda logits: logits.argmax(-1).float(), r"gave float32 of shape \(1,\)"),
        (lambda logits: torch.tensor([2304]), r"gave the token id 2304 for a vocabulary of 2,304"),
        (lambda logits: logits * float("nan"), r"NaN"),
        (lambda logits: torch.full_like(logits, -torch.inf), r"no token can be drawn"),
        (lambda logits: 1 / 0, r"raised ZeroDivisionError"),
        (lambda logits: None, r"raised|gave"),
    ],
)
def test_a_sampler_that_is_wrong_is_told(tiny: LoadedTarget, sampler: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        tiny.complete([[2, 5]], AnswerSettings(choose_sampling(sampler), max_new_tokens=2))


def test_max_length_counts_the_prompt_of_each_row(tiny: LoadedTarget, prompts: list[list[int]]) -> None:
    completions = tiny.complete(prompts, AnswerSettings(max_new_tokens=99, max_length=17, batch_size=4))
    for prompt, completion in zip(prompts, completions, strict=True):
        (alone,) = tiny.complete([prompt], AnswerSettings(max_new_tokens=17 - len(prompt)))
        assert completion == alone
        assert completion.stopped or len(prompt) + completion.num_tokens == 17
    with pytest.raises(DataError, match=r"prompt 2 of 4 has 8 tokens.*the longest length allowed is 6 tokens"):
        tiny.complete(prompts, AnswerSettings(max_new_tokens=9, max_length=6))
    with pytest.raises(DataError, match=r"the prompt has 8,192 tokens.*the model's context is 8,192"):
        tiny.complete([[2] * 8192], AnswerSettings(max_new_tokens=1))


def test_stop_strings_end_each_row_for_itself(tiny: LoadedTarget, prompts: list[list[int]]) -> None:
    plain = tiny.complete(prompts, AnswerSettings(max_new_tokens=24, batch_size=4))
    stop = (plain[0].text[4:7], plain[3].text[9:12])
    stopped = tiny.complete(prompts, AnswerSettings(max_new_tokens=24, batch_size=4, stop_strings=stop))
    for before, after in zip(plain, stopped, strict=True):
        ends = [at for string in stop if (at := before.text.find(string)) >= 0]
        assert after.text == before.text[: min(ends, default=None)].strip()
        assert after.stopped or not ends
        assert after.num_tokens <= before.num_tokens
    assert stopped[0].text != plain[0].text


def test_streamed_pieces_are_the_answer(tiny: LoadedTarget, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        (plain,) = tiny.complete([prompt], AnswerSettings(max_new_tokens=24))
        for stop in ((), (plain.text[5:8],)):
            pieces: list[str] = []
            (completion,) = tiny.complete(
                [prompt], AnswerSettings(max_new_tokens=24, stop_strings=stop), on_text=pieces.append
            )
            assert "".join(pieces) == completion.text
            assert len(pieces) > 3 or stop


def test_left_padding() -> None:
    batch = pad_left([[2, 5], [2, 6, 7]], pad_token_id=0, device="cpu")
    assert batch["input_ids"].tolist() == [[0, 2, 5], [2, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_greedy_is_the_default() -> None:
    config = to_generation_config(AnswerSettings(), max_new_tokens=5, stop_token_ids=[1, 107], pad_token_id=0)
    assert not config.do_sample
    assert config.eos_token_id == [1, 107]
