"""What token ids and labels the rows of every kind of template have, under one number for the format of the encoding.

A change that fails here makes other tokens of the same rows. If that is meant, raise ENCODING_FORMAT in
gemma_tune/data/encode/cache.py, or users train on tokens of the old form from their cache; then pin the new ones here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.encode.cache import ENCODING_FORMAT
from gemma_tune.data.open import load_data, open_data
from gemma_tune.data.rows.template import list_templates
from gemma_tune.recipe.schema import DataSection, Recipe

TURNS = [{"role": "user", "content": "Who bakes?"}, {"role": "assistant", "content": "The baker."}]
MORE = [{"role": "user", "content": "Sicher, Jörg? 🦆"}, {"role": "assistant", "content": " Yes. "}]
ANSWERED = {
    "response": "  It is 4 <end_of_turn>, cafÃ© a.b@c-d.com[1].  ",
    "output": "Four.",
    "completion": "4\n",
    "text": "Über 2 + 2.",
}
ROW: dict[str, Any] = {"instruction": "What is 2 + 2?", "context": "Café", "input": "2\n\n2", "prompt": "2 + 2 ="}
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [{"messages": TURNS + MORE}, {"messages": TURNS}],
    "chat-completion": [
        {"prompt": [*TURNS, MORE[0]], "completion": MORE[1:]},
        {"prompt": TURNS[:1], "completion": "4."},
    ],
    "preference": [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": MORE[1:]}],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as they stand": {},
    "all, control": {"train_on": "all", "control_tokens": "control"},
    "cleaned": {"clean": {"pii": "mask", "fix_encoding": True, "strip_citations": True, "drop_duplicates": "near"}},
}
# Format → template → for each of the settings the rows' tokens, those in the loss, and a hash of ids and labels.
PINNED: dict[int, dict[str, tuple[tuple[int, int, str], ...]]] = {
    2: {
        "alpaca": ((67, 8, "551c53d11fd2a5df"), (67, 65, "7549e266450bcec0"), (67, 8, "551c53d11fd2a5df")),
        "alpaca-chat": ((54, 8, "b163b77ddf7d5a46"), (54, 52, "845f5e705d061918"), (54, 8, "b163b77ddf7d5a46")),
        "chat": ((70, 12, "c6bee00152b285b3"), (70, 68, "097be0655a494dc3"), (70, 12, "c6bee00152b285b3")),
        "chat-completion": ((69, 7, "cd7dcbfa41866266"), (69, 67, "8e28b0ffd204cd67"), (69, 7, "cd7dcbfa41866266")),
        "completion": ((22, 6, "2678f3eee6abae27"), (22, 20, "9c4fb49f1e25409e"), (11, 3, "cc7a60d22607412a")),
        "dolly": ((134, 76, "9f733699ca7d05d5"), (114, 112, "594ddeb839250dd5"), (120, 62, "3ebd52c1b2311761")),
        "dolly-chat": ((124, 76, "59559c5a40b199e2"), (104, 102, "0a9ad57d968adf95"), (110, 62, "5b8f139430d6d76e")),
        "preference": ((19, 4, "dd585c7344f89925"), (19, 18, "2018a3ae61cce647"), (19, 4, "dd585c7344f89925")),
        "text": ((34, 18, "1d3b52f6191d9fe4"), (34, 32, "b326012c59626de6"), (34, 18, "1d3b52f6191d9fe4")),
    }
}


@pytest.mark.parametrize("template", list_templates())
def test_token_ids_and_labels_are_those_of_this_format(template: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ROWS.get(template, [ROW | ANSWERED, ROW | ANSWERED | {"context": "", "input": "", "text": "It ends."}])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for settings in SETTINGS.values():
        data = {"source": str(path), "template": template, "max_seq_tokens": 512, "eval_fraction": 0, "cache": False}
        recipe = Recipe(data=DataSection(**data | settings))
        base, inputs = open_data(recipe)
        train = load_data(recipe, base=base, inputs=inputs)[2].train
        decided = json.dumps([(row.input_ids, row.labels) for row in train])
        digest = hashlib.sha256(decided.encode()).hexdigest()[:16]
        found.append((train.num_tokens, int(train.num_supervised().sum()), digest))
    assert tuple(found) == PINNED[ENCODING_FORMAT][template], "raise ENCODING_FORMAT: see the head of this file"
