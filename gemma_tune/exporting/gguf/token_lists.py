"""Cuts texts into tokens by the lists that a GGUF file holds, as llama.cpp does, where llama.cpp is not installed.

It shares nothing with what wrote the lists. transformers' own reader (5.17) knows no Gemma 1, and cut 6 of 65 tricky
strings of a Gemma 2 in another way than its tokenizer and llama.cpp. Source: `llm_tokenizer_spm` and
`tokenizer_st_partition` in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.header import read_gguf_header

_SPACE = "▁"
_PREFIX = "tokenizer.ggml."
_REQUIRED = ("model", "tokens", "scores", "token_type", "bos_token_id", "eos_token_id")
# `llama_token_type` of llama.h: the kinds that a text is searched for before it is cut, and that of a byte's piece.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_HINT = "export it again"


@dataclass(frozen=True)
class GgufTokenizer:
    """llama.cpp's tokenizer of the kind "llama"."""

    id_of: Mapping[str, int]
    scores: Sequence[float]  # by id; of two adjacent pieces those are joined first whose joined text has the highest
    whole: tuple[str, ...]  # the tokens that are never cut nor joined, the longest first
    before: tuple[int, ...]  # before, after: the ids around every text
    after: tuple[int, ...]
    adds_space: bool  # whether a space is put before the text, and after each whole token

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, control tokens that it spells included. ExportError: llama.cpp would abort on it."""
        parts: list[str | int] = [text]
        for token in self.whole:
            if token in text:
                parts = [piece for part in parts for piece in self._split(part, token)]
        ids = list(self.before)
        is_begin = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                is_begin = True
            elif part:
                space = " " if self.adds_space and is_begin else ""
                ids += self._cut((space + part).replace(" ", _SPACE))
                is_begin = False
        return [*ids, *self.after]

    def _split(self, part: str | int, token: str) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        first, *others = part.split(token)
        yield first
        for other in others:
            yield self.id_of[token]
            yield other

    def _cut(self, text: str) -> Iterator[int]:
        """Join the best adjacent pair, the left one of equals, until no pair is a token."""
        symbols = list(text)  # one that was joined to its left neighbour becomes ""
        left_of, right_of = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
        pairs: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols) and (joined := symbols[left] + symbols[right]) in self.id_of:
                heappush(pairs, (-self.scores[self.id_of[joined]], left, right, joined))

        for place in range(len(symbols) - 1):
            offer(place, place + 1)
        while pairs:
            _, left, right, joined = heappop(pairs)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
                continue  # one of the two was joined to another since
            symbols[left], symbols[right] = joined, ""
            after = right_of[left] = right_of[right]
            if after < len(symbols):
                left_of[after] = left
            offer(left_of[left], left)
            offer(left, after)
        for symbol in filter(None, symbols):
            found = self.id_of.get(symbol)
            yield from (self._byte(byte) for byte in symbol.encode()) if found is None else (found,)

    def _byte(self, byte: int) -> int:
        """Older Gemmas have a tab where others have `<0x09>`."""
        found = self.id_of.get(f"<0x{byte:02X}>", self.id_of.get(chr(byte)) if byte < 128 else None)
        if found is None:
            raise ExportError(f"no token stands for the byte 0x{byte:02X}; llama.cpp aborts on it", hint=_HINT)
        return found


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Read a file's tokenizer. ExportError: it is of another kind than Gemma 1 to 3 have, or its lists do not fit."""
    header = read_gguf_header(path, with_lists=True)
    values = {key.removeprefix(_PREFIX): value for key, value in header.metadata.items() if key.startswith(_PREFIX)}
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ExportError(f"{path}: its tokenizer lacks {', '.join(missing)}", hint=_HINT)
    if values["model"] != "llama":
        what = f"its tokenizer is of the kind {values['model']!r}, those of Gemma 1, 2 and 3 are 'llama'"
        raise ExportError(f"{path}: {what}", hint=_HINT)
    tokens, scores, types = values["tokens"], values["scores"], values["token_type"]
    num_rows = next((tensor.shape[0] for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    if not len(tokens) == len(scores) == len(types) == num_rows:
        what = f"{len(tokens)} tokens, {len(scores)} scores and {len(types)} types for {num_rows} rows of the embedding"
        raise ExportError(f"{path}: {what}", hint=_HINT)
    id_of = {token: index for index, token in enumerate(tokens)}
    if len(id_of) != num_rows:
        raise ExportError(f"{path}: two tokens have one text", hint=_HINT)
    kinds = dict(zip(tokens, types, strict=True))
    mistaken = next((token for token, kind in kinds.items() if (kind == _BYTE) != _is_byte(token)), None)
    if mistaken is not None:
        what = f"the token {mistaken!r} has the type {kinds[mistaken]}, for which llama.cpp would write another text"
        raise ExportError(f"{path}: {what}", hint=_HINT)
    whole = [token for token, kind in kinds.items() if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    return GgufTokenizer(
        id_of=id_of,
        scores=scores,
        whole=tuple(sorted(whole, key=lambda token: -len(token.encode()))),
        # What is assumed where the file says nothing is what llama.cpp assumes.
        before=_ends(values, "add_bos_token", "bos_token_id", default=True),
        after=_ends(values, "add_eos_token", "eos_token_id", default=False),
        adds_space=values.get("add_space_prefix", True),
    )


def _ends(values: Mapping[str, Any], flag: str, token: str, *, default: bool) -> tuple[int, ...]:
    return (values[token],) if values.get(flag, default) else ()


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
