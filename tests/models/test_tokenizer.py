"""What a tokenizer.json of somebody else's may not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR


def replace_a(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    ("normalizer", "refused"),
    [
        (replace_a("▁"), False),
        ({"type": "Prepend", "prepend": "▁"}, False),
        (None, False),
        (replace_a("a" * 1000), True),
        ({"type": "Sequence", "normalizers": [replace_a("a" * 10)] * 8}, True),
        ({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace_a("aaaa")] * 4}]}, True),
        ({"type": "Prepend", "prepend": "x" * 100_000}, True),
    ],
)
def test_a_normalizer_that_makes_texts_grow_is_refused(
    normalizer: dict[str, Any] | None, refused: bool, tmp_path: Path
) -> None:
    for name, changed in (
        ("tokenizer.json", {"normalizer": normalizer}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((TINY_MODEL_DIR / name).read_text(encoding="utf-8"))
        (tmp_path / name).write_text(json.dumps(content | changed), encoding="utf-8")
    shutil.copy(TINY_MODEL_DIR / "config.json", tmp_path)
    if not refused:
        assert load_tokenizer(tmp_path)("a").input_ids
        return
    with pytest.raises(ModelError, match=r"tokenizer\.json: the normalizer can make a text [0-9,]+ times as long"):
        load_tokenizer(tmp_path)
