"""YAML that readers of 1.1 and of 1.2 take for the same."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gemma_tune.yaml_io import yaml_block, yaml_scalar

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.text(st.sampled_from(" \t#:-'\"ab{"), max_size=12), min_size=2, max_size=5).map("\n".join),
)


def read(text: str) -> object:
    """The value as PyYAML (1.1) and ruamel (1.2) read it."""
    value = yaml.safe_load(text)
    assert YAML(typ="safe", pure=True).load(text) == value
    return value


@given(st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_both_readers_agree(words: list[str], lines: str) -> None:
    items = "".join(f"  - {yaml_scalar(word)}\n" for word in words)
    text = f"a:\n{items}b:\n  c:\n    {yaml_scalar(lines)}: {yaml_block(lines, 6)}\n  d: 1\ne: {yaml_block(lines, 2)}\n"
    assert read(text) == {"a": words, "b": {"c": {lines: lines}, "d": 1}, "e": lines}
    assert all("\n" not in yaml_scalar(word) for word in words)


@pytest.mark.parametrize(
    "word", ["no", "on", "y", "None", "null", "~", "1:30", "0x1", "1e3", "1_000", "01", "", "=", "2026-01-01"]
)
def test_words_stay_words(word: str) -> None:
    assert read(f"a: {yaml_scalar(word)}\n") == {"a": word}


def test_what_a_person_reads() -> None:
    assert yaml_scalar("batch/v1") == "batch/v1" and yaml_scalar("a b") == '"a b"'
    assert yaml_block("x:\n\n  y\n", 4) == "|\n    x:\n\n      y"
    assert yaml_block("x\n\n", 2) == "|+\n  x\n"
    assert yaml_block("a\u2028b\n", 4) == '"a\\Lb\\n"'
