"""The token ids of a tokenizer.json next to the rows of an embedding, without transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object
from gemma_tune.errors import ModelError

# Gemma 3 1B has the tokenizer of its larger siblings, whose image token lies one beyond its embedding. No text is cut
# into it.
_OF_TOWERS = frozenset({"<image_soft_token>", "<audio_soft_token>"})


def read_added_tokens(path: Path) -> list[dict[str, Any]]:
    """Decode only this list of a tokenizer.json: the whole of Gemma's (34 MB) takes 0.3 GB as Python objects."""
    text = path.read_text(encoding="utf-8")
    start = text.find('"added_tokens":')
    if start < 0:
        return []
    added: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text, text.index("[", start))[0]
    return added


def read_token_ids(path: Path) -> dict[str, int]:
    """Read every token of a tokenizer.json with its id; takes 0.3 GB for Gemma's 262,144 pieces."""
    content = read_json_object(path, error=ModelError)
    try:
        pieces = content["model"]["vocab"]
        return {**pieces, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(
            f"{path} is not the tokenizer of a Gemma: it has no vocabulary with ids",
            hint="copy tokenizer.json and tokenizer_config.json of the base model there",
        ) from None


def ids_beyond(tokens: Iterable[tuple[str, int]], *, num_rows: int) -> dict[str, int]:
    """Return the tokens that have no row in an embedding of `num_rows`; the first of text that holds one fails."""
    return {text: index for text, index in tokens if index >= num_rows and text not in _OF_TOWERS}
