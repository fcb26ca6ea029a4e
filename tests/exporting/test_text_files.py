"""What goes with a model, and what stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.exporting.text_files import licence_notice, portable_settings, tokenizer_files, write_text_files
from gemma_tune.models.catalogue import find_model


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"tokenizer_file": "/home/x/tokenizer.json", "a": 1}, {"a": 1}),
        ({"name_or_path": "C:\\models\\gemma", "b": [{"cache_dir": "~/cache", "c": 2}]}, {"b": [{"c": 2}]}),
        ({"vocab_file": "file:///tmp/vocab"}, {}),
        ({"vocab_file": "tokenizer.model", "name_or_path": "google/gemma-2b"}, None),
        ({"bos_token": "/", "target_modules": "/.*q_proj"}, None),
        (
            {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "inner": {"auto_mapping": {"parent_library": "os"}}},
            {"inner": {}},
        ),
    ],
)
def test_portable_settings(settings: dict[str, Any], kept: dict[str, Any] | None) -> None:
    assert portable_settings(settings) == (settings if kept is None else kept)


def test_a_file_with_nothing_to_hide_keeps_its_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    plain, odd, broken = b'{"a":1,   "b": "\\u00e9"}', {"a": 1, "tokenizer_file": "/x"}, b"{"
    (source / "tokenizer_config.json").write_bytes(plain)
    (source / "special_tokens_map.json").write_text(json.dumps(odd), encoding="utf-8")
    (source / "generation_config.json").write_bytes(broken)
    files = {path.name: path for path in source.iterdir()}
    write_text_files(target, copied=files, given={"NOTICE": "terms\n"})
    assert (target / "tokenizer_config.json").read_bytes() == plain
    assert json.loads((target / "special_tokens_map.json").read_text(encoding="utf-8")) == {"a": 1}
    assert (target / "generation_config.json").read_bytes() == broken
    assert (target / "NOTICE").read_text(encoding="utf-8") == "terms\n"
    assert json.loads((source / "special_tokens_map.json").read_text(encoding="utf-8")) == odd


def test_the_tokenizer_that_was_trained_with_is_taken_whole(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for directory, names in {
        base: ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja"),
        adapter: ("tokenizer.json",),
    }.items():
        directory.mkdir()
        for name in names:
            (directory / name).write_text(name, encoding="utf-8")
    assert tokenizer_files(base, adapter) == {
        "tokenizer.json": adapter / "tokenizer.json",
        "tokenizer.model": base / "tokenizer.model",
    }
    assert len(tokenizer_files(base, tmp_path / "none")) == 4


def test_licence_notices() -> None:
    gemma = str(licence_notice(find_model("gemma-2b")))
    assert gemma.strip() == (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    )
    assert "Apache-2.0" in str(licence_notice(find_model("gemma-4-e4b-it")))
    assert "CC0 1.0" in str(licence_notice(find_model("gemma-tiny")))
    assert licence_notice(None) is None
