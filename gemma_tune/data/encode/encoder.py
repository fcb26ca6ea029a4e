"""From segments to token ids and labels.

One code path for training and for asking, for all templates: row text is never read as control tokens, the control
tokens of a template are looked up instead of parsed, and the labels follow from the segments, never from a search.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from gemma_tune.data.encode.arrays import EncodedRow, EncodedRows, starts_of
from gemma_tune.data.rows.chat_template import ChatTokenizer, control_strings
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.segments import Segment
from gemma_tune.errors import DataError
from gemma_tune.models.families.known import turn_ends

# Rows and characters per call of the tokenizer: enough to keep its threads busy, while the Encoding objects, which hold
# about 0.1 kB a token, take no more than some 50 MB.
_BATCH_ROWS = 2048
_BATCH_CHARACTERS = 2_000_000
# One for the process: encoders may share a backend, and encoding uses all cores from one thread anyway.
_BACKEND_LOCK = threading.Lock()


class FastTokenizer(ChatTokenizer, Protocol):
    """What is read from a transformers tokenizer."""

    bos_token_id: Any
    eos_token_id: Any


TrainOn = Literal["response", "last_response", "all"]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text without control tokens, or one control token by its id."""

    text: str
    token_id: int | None
    supervised: bool


class Encoder:
    """Encodes segments with one tokenizer."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        """Take a transformers tokenizer; it is not changed.

        Raises:
            DataError: it is not a fast tokenizer, has no BOS or eos, or reads control tokens in plain text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                "the model's tokenizer has no tokenizer.json, which is needed to tell text from control tokens"
            )
        for name, value in (("BOS", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
            if value is None:
                raise DataError(
                    f"the model's tokenizer has no {name} token; every Gemma has one",
                    hint="check its tokenizer_config.json",
                )
        self._backend = backend
        self.bos_token_id: int = tokenizer.bos_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        self._bos, self._eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
        ids = {string: backend.token_to_id(string) for string in control_strings(tokenizer)}
        self._control_ids: dict[str, int] = {string: ids[string] for string in ids if ids[string] is not None}
        self._control = re.compile("|".join(re.escape(string) for string in self._control_ids))
        self._require_plain_text()

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of all control tokens."""
        return frozenset(self._control_ids.values())

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the eos and the turn end, as far as the tokenizer has them."""
        ends = (self._control_ids.get(string) for string in turn_ends())
        return tuple(dict.fromkeys([self.eos_token_id, *(token_id for token_id in ends if token_id is not None)]))

    def encode(self, segments: Sequence[Segment], *, train_on: TrainOn = "response") -> EncodedRow:
        """Encode one row; see `encode_rows`."""
        return self.encode_rows([segments], train_on=train_on)[0]

    def encode_rows(self, rows: Sequence[Sequence[Segment]], *, train_on: TrainOn = "response") -> EncodedRows:
        """Encode rows: exactly one BOS at position 0, then the segments.

        Neighbouring text is tokenized together unless one part is supervised and the other is not, so that a prompt has
        the same ids in training and when it is asked. `last_response` supervises the last answer of a conversation
        only; with `all`, every token but the BOS has a label.
        """
        batches = in_batches(rows, size=lambda segments: sum(len(segment.text) for segment in segments))
        return EncodedRows.join(self._encode_batch(batch, train_on=train_on) for batch in batches)

    def encode_prompt(self, segments: Sequence[Segment]) -> list[int]:
        """The ids of a prompt, the BOS first."""
        return self.encode(segments).input_ids

    def count_control_strings(self, segments: Sequence[Segment]) -> int:
        """How often the row's own text spells a control token (S8). Such text is encoded as text."""
        return sum(len(self._control.findall(segment.text)) for segment in segments if not segment.control)

    def with_controls(self, example: Example) -> Example:
        """The example with control tokens meant wherever its text spells one, for rows that were templated elsewhere.

        A BOS or eos at the ends of the row is removed, as every row gets its own.
        """
        segments = [replace(segment, control=True) for segment in example.segments]
        segments[0] = replace(segments[0], text=segments[0].text.removeprefix(self._bos))
        if segments[-1].stop and len(segments) > 1:
            segments[-2] = replace(segments[-2], text=segments[-2].text.rstrip().removesuffix(self._eos))
        return replace(example, segments=tuple(segments))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token of a plain text, in characters."""
        with self._plain_backend() as backend:
            return list(backend.encode(text, add_special_tokens=False).offsets)

    def _encode_batch(self, rows: Sequence[Sequence[Segment]], *, train_on: TrainOn) -> EncodedRows:
        pieces = [self._pieces(segments) for segments in rows]
        texts = iter(self._encode_texts([piece.text for row in pieces for piece in row if piece.token_id is None]))
        token_ids: list[int] = []
        # Supervision in runs, not token by token: (length, supervised).
        runs: list[int] = []
        flags: list[bool] = []
        lengths = np.empty(len(pieces), dtype=np.int64)
        for index, row in enumerate(pieces):
            start = len(token_ids)
            token_ids.append(self.bos_token_id)
            runs.append(1)
            flags.append(False)
            last_prompt = max((at for at, piece in enumerate(row) if not piece.supervised), default=-1)
            for at, piece in enumerate(row):
                before = len(token_ids)
                if piece.token_id is None:
                    token_ids += next(texts)
                else:
                    token_ids.append(piece.token_id)
                runs.append(len(token_ids) - before)
                flags.append(train_on == "all" or (piece.supervised and (train_on == "response" or at > last_prompt)))
            lengths[index] = len(token_ids) - start
        return EncodedRows(
            np.array(token_ids, dtype=np.int32),
            np.repeat(np.array(flags, dtype=np.bool_), runs),
            starts_of(lengths),
            lengths,
        )

    def _pieces(self, segments: Sequence[Segment]) -> list[_Piece]:
        """A row as control tokens and texts, neighbouring texts joined where they are supervised alike."""
        pieces: list[_Piece] = []
        texts: list[str] = []
        supervised = False

        def flush() -> None:
            if texts:
                pieces.append(_Piece("".join(texts), None, supervised))
                texts.clear()

        for segment in segments:
            if segment.supervised != supervised:
                flush()
                supervised = segment.supervised
            if segment.stop:
                flush()
                pieces.append(_Piece("", self.eos_token_id, supervised))
            elif not segment.control:
                texts.append(segment.text)
            else:
                end = 0
                for found in self._control.finditer(segment.text):
                    texts.append(segment.text[end : found.start()])
                    flush()
                    pieces.append(_Piece("", self._control_ids[found[0]], supervised))
                    end = found.end()
                texts.append(segment.text[end:])
        flush()
        return [piece for piece in pieces if piece.text or piece.token_id is not None]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        with self._plain_backend() as backend:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @contextmanager
    def _plain_backend(self) -> Iterator[Any]:
        """The tokenizer's backend, set to read no control tokens.

        It is shared with the tokenizer, which leaves the settings of its last call in it and sets its own before the
        next one.
        """
        with _BACKEND_LOCK:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            try:
                yield self._backend
            finally:
                self._backend.encode_special_tokens = False

    def _require_plain_text(self) -> None:
        strings = list(self._control_ids)
        for string, ids in zip(strings, self._encode_texts(strings), strict=True):
            if self._control_ids[string] in ids:
                raise DataError(
                    f"the model's tokenizer reads {string!r} as a control token even in plain text",
                    hint="its tokenizer.json is damaged",
                )


def in_batches(rows: Iterable[Row], *, size: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Rows in groups that the tokenizer takes at once; `size` gives a row's characters."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += size(row)
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
