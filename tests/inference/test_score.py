"""Scores against plain transformers; tests/inference/test_score_keras_hub.py compares them with KerasHub's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

from gemma_tune.data.sources.items import SourceRow
from gemma_tune.errors import DataError
from gemma_tune.inference.load_target import LoadedTarget
from gemma_tune.inference.score import row_of_example, row_of_response, score_rows, score_tokens

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.tensor([[2, 5, 17, 40, 63, 95], [2, 9, 9, 30, 4, 1]])
OTHERS = TOKENS.flip(0)
TARGETS = TOKENS.roll(-1, dims=1)


def make(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_implementation="eager")).eval()
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).eval()
    model = GemmaForCausalLM(GemmaConfig(**SIZES)).eval()
    if family == "gemma":
        return model
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval()


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3", "gemma with LoRA"])
def small(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def seen(model: Any, token_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}

    def keep(activations: torch.Tensor, index: int) -> torch.Tensor:
        found[index] = activations.detach()
        return activations

    score_tokens(model, token_ids, layer_intercept_fn=keep)
    return found


def test_logits_and_losses(small: Any) -> None:
    with torch.no_grad():
        logits = small(input_ids=TOKENS).logits
    assert torch.equal(score_tokens(small, TOKENS), logits)
    losses = score_tokens(small, TOKENS.tolist(), None, "loss", None, TARGETS.numpy())
    assert losses.shape == (2, 6)
    wanted = -logits.log_softmax(-1).gather(-1, TARGETS[..., None])[..., 0]
    torch.testing.assert_close(losses.detach(), wanted)


def test_padding_is_not_looked_at(small: Any) -> None:
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    changed = TOKENS.clone()
    changed[1, 3:] = 7
    scores = [score_tokens(small, ids, padding_mask=mask)[:, :3].detach() for ids in (TOKENS, changed)]
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(scores[0], score_tokens(small, TOKENS)[:, :3].detach())


def test_intercepted_activations_are_transformers_hidden_states(small: Any) -> None:
    found = seen(small, TOKENS)
    with torch.no_grad():
        states = small(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert sorted(found) == [-1, 0, 1, 2]
    torch.testing.assert_close(found[-1] * 32**0.5, states[0])
    for index in (0, 1):  # transformers puts its last norm over the last one
        torch.testing.assert_close(found[index], states[index + 1])


@pytest.mark.parametrize("index", [-1, 0, 1, 2])
def test_activations_of_another_text_give_its_logits(small: Any, index: int) -> None:
    others = seen(small, OTHERS)

    def patch(activations: torch.Tensor, at: int) -> torch.Tensor:
        return others[at] if at == index else activations

    patched = score_tokens(small, TOKENS, layer_intercept_fn=patch)
    torch.testing.assert_close(patched, score_tokens(small, OTHERS))
    assert (patched - score_tokens(small, TOKENS)).abs().max() > 1e-3
    assert torch.equal(score_tokens(small, TOKENS), score_tokens(small, TOKENS)), "hooks stayed behind"


def test_a_16_bit_model_is_not_changed_by_looking() -> None:
    model = make("gemma").to(torch.bfloat16)
    looked = score_tokens(model, TOKENS, layer_intercept_fn=lambda activations, index: activations)
    assert torch.equal(looked, score_tokens(model, TOKENS))


def test_gradients_reach_the_embeddings() -> None:
    model = make("gemma").requires_grad_(False)
    watched: list[torch.Tensor] = []

    def watch(activations: torch.Tensor, index: int) -> torch.Tensor:
        if index == -1:
            watched.append(activations.requires_grad_())
        return activations

    score_tokens(model, TOKENS, scoring_mode="loss", target_ids=TARGETS, layer_intercept_fn=watch).sum().backward()
    embeddings = (model.get_input_embeddings()(TOKENS)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum").backward()
    assert embeddings.grad is not None
    torch.testing.assert_close(watched[0].grad, embeddings.grad * 32**0.5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"scoring_mode": "probs"}, r"scoring_mode is 'probs'"),
        ({"scoring_mode": "loss"}, r"a loss needs target_ids"),
        ({"token_ids": [2, 5]}, r"token_ids is int64 of shape \(2,\)"),
        ({"token_ids": [[2.0]]}, r"token_ids is float32"),
        ({"token_ids": [[2, 96]]}, r"ids from 2 to 96"),
        ({"target_ids": [[2]]}, r"target_ids has shape \(1, 1\), token_ids has \(2, 6\)"),
        ({"padding_mask": [[1]]}, r"padding_mask has shape"),
        ({"layer_intercept_fn": lambda activations, index: None}, r"returned NoneType for index -1"),
        ({"layer_intercept_fn": lambda activations, index: activations[:1]}, r"returned shape \(1, 6, 32\)"),
    ],
)
def test_mistakes(given: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        score_tokens(make("gemma"), **{"token_ids": TOKENS, **given})


# --- texts ----------------------------------------------------------------------------------------------------------


def oracle(loaded: LoadedTarget, token_ids: list[int], num_scored: int) -> list[float]:
    """A row alone, without padding."""
    with torch.no_grad():
        log_probs = loaded.model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(token_ids[1:])[:, None])[-num_scored:, 0].tolist()


def test_responses_in_batches_score_as_one_by_one(tiny: LoadedTarget) -> None:
    pairs = [("The town of Ostel", " is old."), ("A goat", " eats grass and bread."), ("", " x"), ("One", " two" * 30)]
    rows = [row_of_response(tiny, {"prompt": prompt}, response) for prompt, response in pairs]
    scores = score_rows(tiny, rows, batch_size=3)
    for row, score, (prompt, response) in zip(rows, scores, pairs, strict=True):
        assert row.token_ids[0] == 2
        assert "".join(token.text for token in score.tokens) == response + "<eos>"
        assert tiny.tokenizer.decode(row.token_ids) == f"<bos>{prompt}{response}<eos>"
        wanted = oracle(tiny, list(row.token_ids), len(score.tokens))
        assert [token.log_prob for token in score.tokens] == pytest.approx(wanted, abs=1e-4)
        assert score.log_likelihood == pytest.approx(sum(wanted), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-sum(wanted) / len(wanted)), rel=1e-4)


def test_a_response_is_scored_as_the_row_that_it_is_in_training(tiny: LoadedTarget, tiny_chat: LoadedTarget) -> None:
    row = SourceRow({"prompt": "A goat", "completion": " eats."}, "rows.jsonl:1")
    assert row_of_example(tiny, row) == row_of_response(tiny, {"prompt": "A goat"}, " eats.")
    messages = [{"role": "user", "content": "A goat"}, {"role": "assistant", "content": "Eats."}]
    example = row_of_example(tiny_chat, SourceRow({"messages": messages}, "rows.jsonl:1"))
    assert example == row_of_response(tiny_chat, {"messages": messages[:1]}, "Eats.\n")
    (score,) = score_rows(tiny_chat, [example])
    assert score.tokens[-1].text == "<end_of_turn>"


def test_every_answer_of_a_conversation_is_scored(tiny_chat: LoadedTarget) -> None:
    texts = ["Hi", "Hello.", "2 + 2?", "Four."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    (score,) = score_rows(tiny_chat, [row_of_example(tiny_chat, SourceRow({"messages": messages}, "x"))])
    assert "".join(token.text for token in score.tokens) == "Hello.<end_of_turn>Four.<end_of_turn>"


def test_texts_that_cannot_be_scored(tiny: LoadedTarget) -> None:
    with pytest.raises(DataError, match=r"the response: is empty"):
        row_of_response(tiny, {"prompt": "x"}, "  ")
    with pytest.raises(DataError, match=r"row 1 has [\d,]+ tokens; the model's context has 8,192"):
        score_rows(tiny, [row_of_response(tiny, {"prompt": "x"}, " word" * 8200)])
