"""YAML that readers of 1.1 and of 1.2 take for the same."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gemma_tune.launching.yaml_text import dump_documents

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.text(st.sampled_from(" \t#:-'\"ab{"), max_size=12), min_size=2, max_size=5).map("\n".join),
)


@given(
    st.dictionaries(st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True), st.one_of(TEXT, st.lists(TEXT), st.integers()))
)
def test_both_readers_agree(values: dict[str, Any]) -> None:
    text = dump_documents([values], header="# a\nb")
    assert yaml.safe_load(text) == values
    assert dict(YAML(typ="safe", pure=True).load(text)) == values


@pytest.mark.parametrize(
    "word", ["no", "on", "y", "None", "null", "~", "1:30", "0x1", "1e3", "1_000", "01", "", "=", "2026-01-01"]
)
def test_words_stay_words(word: str) -> None:
    text = dump_documents([{"a": word}], header="x")
    assert yaml.safe_load(text) == {"a": word}
    assert YAML(typ="safe", pure=True).load(text) == {"a": word}


def test_header_and_documents() -> None:
    text = dump_documents([{"a": 1}, {"b": [1, {"c": "x\ny\n"}]}], header="one\ntwo")
    assert text.startswith("# one\n# two\na: 1\n---\n")
    assert list(yaml.safe_load_all(text)) == [{"a": 1}, {"b": [1, {"c": "x\ny\n"}]}]
    assert "c: |\n" in text
