from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.segments import Segment
from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.vocabulary import TokenType, add_vocabulary, read_vocabulary
from gemma_tune.models.tokenizer import with_one_bos
from gemma_tune.paths import TINY_MODEL_DIR

NUM_ROWS = 2304
Edit = Callable[[dict[str, Any], dict[str, Any]], object]
Edited = Callable[..., Path]


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    """edited(change) -> a tokenizer directory after change(tokenizer.json, tokenizer_config.json)."""

    def make(change: Edit) -> Path:
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        files = [
            json.loads((TINY_MODEL_DIR / name).read_text("utf-8"))
            for name in ("tokenizer.json", "tokenizer_config.json")
        ]
        change(*files)
        for name, content in zip(("tokenizer.json", "tokenizer_config.json"), files, strict=True):
            (directory / name).write_text(json.dumps(content), encoding="utf-8")
        shutil.copyfile(TINY_MODEL_DIR / "config.json", directory / "config.json")
        return directory

    return make


def add_token(tokenizer: dict[str, Any], content: str, index: int, **flags: Any) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": index, "content": content, **plain, **flags})


def test_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    assert {kind.name: kind.value for kind in TokenType} == {kind.name: kind.value for kind in gguf.TokenType}


def test_lists_hold_every_token_at_its_row() -> None:
    vocabulary = read_vocabulary(TINY_MODEL_DIR, num_rows=NUM_ROWS + 3)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)
    assert list(vocabulary.tokens[:NUM_ROWS]) == tokenizer.convert_ids_to_tokens(list(range(NUM_ROWS)))
    assert vocabulary.tokens[NUM_ROWS:] == ("[PAD2304]", "[PAD2305]", "[PAD2306]")
    assert len(vocabulary.scores) == len(vocabulary.types) == NUM_ROWS + 3
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<unk>"] == TokenType.UNKNOWN
    control = {"<pad>", "<eos>", "<bos>", "<mask>", "<start_of_turn>", "<end_of_turn>"}
    assert {token for token, kind in types.items() if kind == TokenType.CONTROL} == control
    assert sum(kind == TokenType.BYTE for kind in types.values()) == 256
    assert types["▁▁"] == types["\n\n"] == types["▁the"] == TokenType.NORMAL
    assert types["[PAD2305]"] == TokenType.UNUSED
    assert vocabulary.special_ids == {"bos": 2, "eos": 1, "unk": 3, "pad": 0, "mask": 4, "eot": 107}
    assert vocabulary.chat_template == tokenizer.chat_template


def test_merges_as_texts_are_merges(edited: Edited) -> None:
    def join(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]

    found = read_vocabulary(edited(join), num_rows=NUM_ROWS)
    assert found.scores == read_vocabulary(TINY_MODEL_DIR, num_rows=NUM_ROWS).scores


class RecordingWriter:
    """Keeps what a `gguf.GGUFWriter` is given, by the method's name."""

    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.written.__setitem__(name, value)


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("does", ["bos", "bos and eos", "eos", "nothing", "no processor"])
def test_a_prompt_has_the_one_bos_of_training_whatever_the_tokenizer_adds(
    edited: Edited, said: bool | None, does: str
) -> None:
    def change(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        del config["add_bos_token"], config["add_eos_token"]
        if said is not None:
            config["add_bos_token"] = config["add_eos_token"] = said
        processor = tokenizer["post_processor"]
        bos, text = processor["single"]
        eos = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
        processor["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}
        processor["single"] = [part for part, name in ((bos, "bos"), (text, ""), (eos, "eos")) if name in does]
        if does == "no processor":
            tokenizer["post_processor"] = None

    directory = edited(change)
    fields = RecordingWriter()
    add_vocabulary(fields, read_vocabulary(directory, num_rows=NUM_ROWS))
    assert fields.written["add_add_bos_token"] is True and fields.written["add_add_eos_token"] is False
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trained = Encoder(tokenizer).encode_prompt([Segment("duck", supervised=False, control=False)])
    assert with_one_bos(tokenizer, "duck") == trained


def test_turn_markers_and_unused_tokens_are_control_whatever_the_file_says(edited: Edited) -> None:
    def unmark(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        for token in tokenizer["added_tokens"]:
            token["special"] = token["content"] not in ("<start_of_turn>", "<end_of_turn>")
        add_token(tokenizer, "<unused0>", tokenizer["model"]["vocab"]["<unused0>"])
        add_token(tokenizer, "\n\n", tokenizer["model"]["vocab"]["\n\n"])
        add_token(tokenizer, "▁▁", tokenizer["model"]["vocab"]["▁▁"])
        add_token(tokenizer, "<table>", NUM_ROWS)

    vocabulary = read_vocabulary(edited(unmark), num_rows=NUM_ROWS + 1)
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<start_of_turn>"] == types["<end_of_turn>"] == types["<unused0>"] == TokenType.CONTROL
    assert types["<table>"] == types["\n\n"] == TokenType.USER_DEFINED
    assert types["▁▁"] == TokenType.NORMAL
    assert vocabulary.tokens[NUM_ROWS] == "<table>"


def test_a_tab_stands_in_for_its_byte_piece(edited: Edited) -> None:
    def replace(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        pieces = tokenizer["model"]["vocab"]
        pieces["\t"] = pieces.pop("<0x09>")

    assert "\t" in read_vocabulary(edited(replace), num_rows=NUM_ROWS).tokens


def test_template_is_found_wherever_it_is(edited: Edited) -> None:
    directory = edited(lambda tokenizer, config: config.update(chat_template="in config"))
    assert read_vocabulary(directory, num_rows=NUM_ROWS).chat_template == "in config"
    (directory / "chat_template.jinja").write_text("in a file", encoding="utf-8")
    assert read_vocabulary(directory, num_rows=NUM_ROWS).chat_template == "in a file"


def test_template_of_a_list_and_of_a_processor(edited: Edited) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    directory = edited(lambda tokenizer, config: config.update(chat_template=named))
    assert read_vocabulary(directory, num_rows=NUM_ROWS).chat_template == "yes"
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}), encoding="utf-8"
    )
    assert read_vocabulary(directory, num_rows=NUM_ROWS).chat_template is None
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}), encoding="utf-8")
    assert read_vocabulary(directory, num_rows=NUM_ROWS).chat_template == "of a processor"


def test_a_stop_token_without_a_field_is_noted(edited: Edited) -> None:
    directory = edited(lambda tokenizer, config: None)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 107, 9]}', encoding="utf-8")
    (note,) = read_vocabulary(directory, num_rows=NUM_ROWS).notes
    assert "stops at 9" in note


def _drop_merge(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    del tokenizer["model"]["merges"][-1]


def _drop_byte(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    pieces = tokenizer["model"]["vocab"]
    pieces["<free>"] = pieces.pop("<0xE2>")


def _two_ids(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    add_token(tokenizer, "<again>", 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: add_token(t, "<new>", NUM_ROWS), r"'<new>' has id 2304, the embedding has 2304 rows"),
        (lambda t, c: add_token(t, "[PAD7]", 7), r"'<unused2>' and '\[PAD7\]' have one id, 7"),
        (_two_ids, r"have one id, 300"),
        (lambda t, c: add_token(t, "▁the", 6), r"token '▁the' has two ids, \d+ and 6"),
        (_drop_byte, r"1 of the 256 byte pieces are missing: <0xE2>"),
        (_drop_merge, r"can be made of two pieces in \d+ ways, but there are \d+ merges"),
        (lambda t, c: t["model"].update(type="Unigram"), r"model\.type is not as in Gemma's tokenizer"),
        (lambda t, c: t["model"].update(byte_fallback=False), r"model\.byte_fallback is not"),
        (lambda t, c: t["model"].update(ignore_merges=True), r"model\.ignore_merges is not"),
        (lambda t, c: t.update(normalizer=None), r"normalizer is not"),
        (lambda t, c: t.update(normalizer={"type": "NFKC"}), r"normalizer is not"),
        (lambda t, c: t.update(pre_tokenizer={"type": "ByteLevel"}), r"pre_tokenizer is not"),
        (lambda t, c: t["added_tokens"][4].update(lstrip=True), r"'<mask>' has lstrip"),
        (lambda t, c: c.update(eos_token="<end>"), r"eos_token is '<end>', which is not in the vocabulary"),
        (lambda t, c: c.pop("bos_token"), r"bos_token is None"),
        (lambda t, c: c.update(extra_special_tokens=["<x>"]), r"extra_special_tokens is '<x>'"),
    ],
)  # fmt: skip
def test_what_lists_cannot_say_is_refused(edited: Edited, change: Edit, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        read_vocabulary(edited(change), num_rows=NUM_ROWS)
    assert caught.value.hint


def test_another_post_processor_is_refused(edited: Edited) -> None:
    def change(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = "<mask>"

    with pytest.raises(ExportError, match=r"the post-processor does not put <bos> .* but other, text"):
        read_vocabulary(edited(change), num_rows=NUM_ROWS)


def test_a_piece_of_the_name_of_an_unused_row_is_refused(edited: Edited) -> None:
    directory = edited(lambda tokenizer, config: add_token(tokenizer, "[PAD2305]", NUM_ROWS))
    with pytest.raises(ExportError, match=r"a token is named \[PADn\]"):
        read_vocabulary(directory, num_rows=NUM_ROWS + 2)


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, num_rows=4)
