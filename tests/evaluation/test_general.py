"""The texts of the forgetting check."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.evaluation.general import GeneralText, encode_general, general_set
from gemma_tune.models.catalogue import find_model
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.paths import TINY_MODEL_DIR


def english() -> tuple[GeneralText, ...]:
    model = find_model("gemma-2b")
    return general_set(LocalModel("gemma-2b", Path("none"), None, model.config, model)).texts


def test_shipped_texts_are_different_from_each_other_and_end() -> None:
    texts = english()
    assert {text.kind for text in texts} == {"prose", "question"}
    assert len({text.prompt + text.text for text in texts}) == len(texts) >= 25
    for text in texts:
        assert text.text.rstrip() == text.text and text.text[-1] in ".!?"
        assert (text.kind == "question") == bool(text.prompt)


def test_the_prompt_is_read_and_the_text_is_scored() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)
    texts = english()
    rows = encode_general(texts, Encoder(tokenizer))
    for index, text in enumerate(texts):
        ids, scored = rows.arrays(index)
        prompt, answer = (
            list(tokenizer(part, add_special_tokens=False).input_ids) for part in (text.prompt, text.text)
        )
        assert ids.tolist() == [tokenizer.bos_token_id, *prompt, *answer]
        assert scored.tolist() == [False] * (1 + len(prompt)) + [True] * len(answer)


def test_the_embedded_model_reads_its_own_world() -> None:
    tiny = general_set(fetch_model("gemma-tiny"))
    assert {text.kind for text in tiny.texts} == {"tiny world"} and len(tiny.texts) == 28
    assert tiny.sha256 == general_set(fetch_model("gemma-tiny")).sha256
