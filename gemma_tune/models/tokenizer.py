"""The tokenizer of a model directory (LEAF)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gemma_tune.errors import ModelError


def load_tokenizer(directory: Path) -> Any:
    """Load a fast tokenizer from local files.

    Raises:
        ModelError: the directory has no tokenizer, or it lacks a pad token of its own (F14).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, use_fast=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} has no tokenizer that transformers can load: {error}",
            hint="copy tokenizer.json and tokenizer_config.json of the model there",
        ) from None
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {directory} has no pad token",
            hint="Gemma's is <pad>, id 0; restore the model's own tokenizer_config.json",
        )
    return tokenizer


def with_one_bos(tokenizer: Any, text: str) -> list[int]:
    """Return a text's token ids, control tokens read, behind the one <bos> that training puts there.

    What the tokenizer's own post-processor adds does not count: some have none.
    """
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
