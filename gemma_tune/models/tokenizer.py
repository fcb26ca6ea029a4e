"""The tokenizer of a model directory (LEAF)."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gemma_tune.errors import ModelError

MAX_GROWTH = 64  # Gemma's own normalizer replaces one character with one


def load_tokenizer(directory: Path) -> Any:
    """Load a fast tokenizer from local files.

    Raises:
        ModelError: the directory has no tokenizer, it makes texts longer without bound, or it lacks a pad token of its
            own (F14).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, use_fast=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} has no tokenizer that transformers can load: {error}",
            hint="copy tokenizer.json and tokenizer_config.json of the model there",
        ) from None
    _check_growth(tokenizer, directory)
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {directory} has no pad token",
            hint="Gemma's is <pad>, id 0; restore the model's own tokenizer_config.json",
        )
    return tokenizer


def _check_growth(tokenizer: Any, directory: Path) -> None:
    """Refuse a normalizer that writes long text for short text: eight small steps can fill the memory."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    steps = [json.loads(normalizer.__getstate__())] if normalizer is not None else []
    growth = 1
    for step in steps:  # which grows by the steps of a sequence
        steps += step.get("normalizers") or []
        growth *= max(1, len(str(step.get("content") or "")), len(str(step.get("prepend") or "")))
    if growth > MAX_GROWTH:
        raise ModelError(
            f"{directory}/tokenizer.json: the normalizer can make a text {growth:,} times as long, and at most "
            f"{MAX_GROWTH} times is allowed",
            hint="restore the model's own tokenizer.json",
        )


def with_one_bos(tokenizer: Any, text: str) -> list[int]:
    """Return a text's token ids, control tokens read, behind the one <bos> that training puts there.

    What the tokenizer's own post-processor adds does not count: some have none.
    """
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
