"""What texts share at their beginnings and ends, and what is not worth telling."""

from __future__ import annotations

import random

import pytest

from gemma_tune.data.text.shared_ends import SharedEnds, has_end, strip_end

WORDS = sorted(str.split("river baker tall walks bread seven under stone mill town road bridge apple lamp"))


def sentences(count: int = 120) -> list[str]:
    draw = random.Random(5)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(3, 20))).capitalize() + draw.choice(".?! ") for _ in range(count)
    ]


@pytest.mark.parametrize("joint", ["", " ", "\n\n"])
@pytest.mark.parametrize(
    "tail",
    ["###eos_token###", "</s>", "<|im_end|>", "<eos>", "[EOS]", "### Response:", "###", "Best regards,\nThe Mill Team"],
)
def test_a_tail_is_found_whole_and_without_what_stands_before_it(tail: str, joint: str) -> None:
    if not joint and tail[0].isalpha():
        joint = "\n"
    texts = [text + joint + tail + "\n" for text in sentences()]
    assert SharedEnds(texts).find("tail") == [tail]
    assert SharedEnds(texts).find("head") == []
    stripped = [strip_end(text, tail, "tail") for text in texts]
    assert stripped == [text.rstrip() for text in sentences()] and all(has_end(text, tail, "tail") for text in texts)


@pytest.mark.parametrize(
    "head", ["As an AI language model,", "Sure! Here is", "<|im_start|>user", "[INST]", "### Input:"]
)
def test_a_head_is_found_in_most_texts(head: str) -> None:
    texts = [f"{head} {text}" if index % 3 else text for index, text in enumerate(sentences())]
    assert SharedEnds(texts).find("head") == [head]
    assert strip_end(texts[1], head, "head") == sentences()[1] and strip_end(texts[0], head, "head") == texts[0]


def test_a_mark_is_found_in_few_texts_and_each_of_several() -> None:
    tails = ["</s>", "<|im_end|>", "", "", ""]
    texts = [text + tails[index % 5] for index, text in enumerate(sentences())]
    assert SharedEnds(texts).find("tail") == ["<|im_end|>", "</s>"]


@pytest.mark.parametrize(
    "texts",
    [
        sentences(),
        ["positive", "negative", "neutral"] * 40,
        [f"The sentiment is {label}." for label in ("positive", "negative")] * 60,
        ["Translate it to French."] * 120,
        [f'{{"name": "{text}", "known": true}}' for text in sentences()],
        [f"```python\n{text}\n```" for text in sentences()],
        [f"**{text}**" for text in sentences()],
        [text + "</s>" for text in sentences(4)],
    ],
    ids=["sentences", "labels", "labels in a sentence", "one text", "JSON", "code", "bold", "four rows"],
)
def test_forms_labels_and_sentences_share_nothing(texts: list[str]) -> None:
    assert SharedEnds(texts).find("head") == [] and SharedEnds(texts).find("tail") == []
