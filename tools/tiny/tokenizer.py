"""LEAF. Trains the tokenizer of `gemma-tiny` and writes it in the form in which Gemma's own tokenizer is shipped.

Gemma's form: pad 0, eos 1, bos 2, unk 3, mask 4, `<start_of_turn>` 106, `<end_of_turn>` 107, runs of line breaks from
108 and of spaces from 139, the 256 byte pieces from 217, no prefix space, byte fallback. The text pieces from 473 on
are learnt here; none of them spans two words, and digits and punctuation stand alone.
The merges are complete: each split of a piece into two pieces is a merge, ordered by the piece it makes. That is what
a conversion from SentencePiece yields, and what lets an exporter write the tokenizer as scores (GGUF does).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import GemmaTokenizer

NUM_PIECES = 2304
SPACE = "▁"
SPECIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<start_of_turn>": 106,
    "<end_of_turn>": 107,
}
FIRST_BYTE_ID = 217
FIRST_TEXT_ID = FIRST_BYTE_ID + 256
# A text that is cut here is never merged across the cut: a word with the space before it, or one single other sign.
_WORD = re.compile(rf"{SPACE}?[A-Za-z]+|{SPACE}|[^A-Za-z{SPACE}]")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- raise_exception('Gemma has no system role: put the text into the first user message') -}}
    {%- endif -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('Roles must alternate user, assistant, user, assistant, and begin with user') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' -}}
    {{- message['content'] | trim -}}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def _fixed_pieces() -> list[str]:
    """Return the pieces below FIRST_TEXT_ID in the order of their ids, gaps filled with `<unusedN>`."""
    placed = {index: piece for piece, index in SPECIAL_IDS.items()}
    placed |= {107 + length: "\n" * length for length in range(1, 32)}
    placed |= {137 + length: SPACE * length for length in range(2, 32)}
    placed |= {FIRST_BYTE_ID + byte: f"<0x{byte:02X}>" for byte in range(256)}
    unused = (f"<unused{number}>" for number in range(FIRST_TEXT_ID))
    return [placed.get(index) or next(unused) for index in range(FIRST_TEXT_ID)]


def _merge_once(symbols: list[str], piece: str) -> list[str]:
    """Join every adjacent pair that spells the piece, from the left."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and merged[-1] + symbol == piece:
            merged[-1] = piece
        else:
            merged.append(symbol)
    return merged


def learn_pieces(texts: Iterable[str], *, num_pieces: int) -> list[str]:
    """Return `num_pieces` text pieces in the order of their ranks: single signs first, then merges.

    A pair is scored by the square root of the counts of the words it occurs in, so that a name told a hundred times is
    made whole before a rare fragment of frequent words.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text.replace(" ", SPACE)))
    signs = sorted(
        {sign for word in counts for sign in word if sign != "\n"} | {chr(code) for code in range(33, 127)} | {SPACE}
    )
    weights = {word: count**0.5 for word, count in counts.items() if len(word) > 1}
    segments = {word: list(word) for word in weights}
    scores: Counter[str] = Counter()
    for word, symbols in segments.items():
        for left, right in pairwise(symbols):
            scores[left + right] += weights[word]
    pieces = list(signs)
    known = set(pieces)
    while len(pieces) < num_pieces:
        candidates = ((score, piece) for piece, score in scores.items() if score > 1e-9 and piece not in known)
        best = max(candidates, key=lambda item: (round(item[0], 6), item[1]), default=None)
        if best is None:
            break
        piece = best[1]
        pieces.append(piece)
        known.add(piece)
        for word, symbols in segments.items():
            if piece not in word:
                continue
            merged = _merge_once(symbols, piece)
            for sequence, sign in ((symbols, -1), (merged, 1)):
                for left, right in pairwise(sequence):
                    scores[left + right] += sign * weights[word]
            segments[word] = merged
    return pieces


def _iter_merges(vocabulary: dict[str, int], pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield every split of every piece into two pieces, in the order of the pieces given."""
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary:
                yield piece[:cut], piece[cut:]


def build_tokenizer(texts: Iterable[str], *, num_pieces: int = NUM_PIECES) -> GemmaTokenizer:
    """Train on the texts and return the tokenizer; the same texts give the same tokenizer."""
    fixed = _fixed_pieces()
    learnt = learn_pieces(texts, num_pieces=num_pieces - len(fixed))
    vocabulary = {piece: index for index, piece in enumerate([*fixed, *learnt])}
    runs = [piece for piece in fixed if set(piece) in ({"\n"}, {SPACE})]
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=list(_iter_merges(vocabulary, [*runs, *learnt])),
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    bos = ("<bos>", SPECIAL_IDS["<bos>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[bos]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tokenizer(tokenizer: GemmaTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"add_bos_token": True, "add_eos_token": False}
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
