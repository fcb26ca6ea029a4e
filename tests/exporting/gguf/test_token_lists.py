"""The reader of a GGUF's own lists against transformers; test_llama_cpp.py holds it against llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.exporting.gguf.token_lists import read_gguf_tokenizer
from gemma_tune.exporting.verify.probe_texts import TRICKY_STRINGS
from gemma_tune.paths import TINY_MODEL_DIR
from tests.exporting.gguf.tokenizing import TRICKY, Change, fuzz_strings, with_other_tokenizer

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert_to_gguf(TINY_MODEL_DIR, output, dtype="q8_0", provenance=GgufProvenance("tiny"))
    return output


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_texts_are_cut_as_by_transformers(family: str, make_gguf_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_gguf_source(family)
    convert_to_gguf(source, tmp_path / "model.gguf", dtype="q8_0", provenance=GgufProvenance(family))
    tokenizer, expected = read_gguf_tokenizer(tmp_path / "model.gguf"), AutoTokenizer.from_pretrained(source)
    texts = [*TRICKY, *TRICKY_STRINGS, *fuzz_strings(500)]
    pairs = zip(texts, expected(texts).input_ids, strict=True)
    different = [text for text, ids in pairs if tokenizer.tokenize(text) != ids]
    assert not different, different[:3]


def test_a_long_text_is_cut_in_no_time(path: Path) -> None:
    """Joining pair by pair over the whole text would take minutes."""
    text = "Once upon a time a duck lived in Applewick. " * 2000
    assert read_gguf_tokenizer(path).tokenize(text) == AutoTokenizer.from_pretrained(TINY_MODEL_DIR)(text).input_ids


def test_what_the_file_does_not_say_is_what_llama_cpp_assumes(path: Path, tmp_path: Path) -> None:
    def leave_out(values: dict[str, Any], id_of: Callable[[str], int]) -> None:
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
            del values[name]

    found = read_gguf_tokenizer(with_other_tokenizer(path, tmp_path / "other.gguf", leave_out))
    assert found == replace(read_gguf_tokenizer(path), before=(2,), after=(), adds_space=True)
    assert found.tokenize("duck<eos>duck") == read_gguf_tokenizer(path).tokenize(" duck<eos> duck")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, id_of: v.pop("scores"), r"its tokenizer lacks scores"),
        (lambda v, id_of: v.update(model="gpt2"), r"is of the kind 'gpt2'"),
        (lambda v, id_of: v["scores"].pop(), r"2304 tokens, 2303 scores and 2304 types for 2304 rows"),
        (lambda v, id_of: [v[n].pop() for n in ("tokens", "scores", "token_type")], r"2303 types for 2304 rows"),
        (lambda v, id_of: v["tokens"].__setitem__(7, "▁the"), r"two tokens have one text"),
        (lambda v, id_of: v["token_type"].__setitem__(id_of("<0x0A>"), 1), r"'<0x0A>' has the type 1"),
        (lambda v, id_of: v["token_type"].__setitem__(id_of("▁the"), 6), r"'▁the' has the type 6"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change: Change, message: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        read_gguf_tokenizer(with_other_tokenizer(path, tmp_path / "other.gguf", change))


def test_a_byte_without_a_token_is_told(path: Path, tmp_path: Path) -> None:
    def rename(values: dict[str, Any], id_of: Callable[[str], int]) -> None:
        for byte, name in ((0x09, "\t"), (0xF0, "<gone>")):
            index = id_of(f"<0x{byte:02X}>")
            values["tokens"][index], values["token_type"][index] = name, 1

    found = read_gguf_tokenizer(with_other_tokenizer(path, tmp_path / "other.gguf", rename))
    assert found.tokenize("\ta") == read_gguf_tokenizer(path).tokenize("\ta")
    with pytest.raises(ExportError, match=r"no token stands for the byte 0xF0"):
        found.tokenize("😀")
