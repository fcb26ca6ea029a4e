"""A tokenizer in Gemma's form, made on the spot, and the chat templates of the Gemma generations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "What does the baker of the small town bake every morning? The baker bakes fresh bread.",
    "Which river runs through the valley, and how long is it? The river is called Elm and runs for nine miles.",
    "Name three things that a gardener needs. A gardener needs a spade, a hose and patience.",
)
TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>")


def _tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's ids for pad, eos, bos and unk, byte fallback, spaces as ▁, newline runs as added tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *TURN_TOKENS]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *pieces], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator([*TEXT, "\n".join(TEXT)], trainer)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    saved = json.loads(backend.to_str())
    # The trainer takes byte pieces for control tokens; in a Gemma they are ordinary pieces.
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(saved))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(TURN_TOKENS),
    )


def _chat_template(name: str) -> str:
    """A chat template as TRL ships it: an independent copy of what the hub's Gemma tokenizers hold."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def tokenizer() -> Any:
    """Gemma-form tokenizer with Gemma 1's chat template."""
    made = _tokenizer()
    made.chat_template = _chat_template("gemma")
    return made


@pytest.fixture(params=["gemma", "gemma3", "gemma4"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """The same with the chat template of each generation (2 has that of 1)."""
    made = _tokenizer()
    made.chat_template = _chat_template(request.param)
    return made


@pytest.fixture
def gemma3_tokenizer() -> Any:
    """The same with Gemma 3's chat template, which knows a system turn."""
    made = _tokenizer()
    made.chat_template = _chat_template("gemma3")
    return made
