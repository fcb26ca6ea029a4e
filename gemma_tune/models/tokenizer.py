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
