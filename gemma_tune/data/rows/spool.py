"""What is kept on disk while it is worked on, so that a set of rows may be larger than memory.

Values are written as JSON, a line each, and read back one by one through a memory map.
"""

from __future__ import annotations

import json
import mmap
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np

from gemma_tune.data.encode.arrays import Ints
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.segments import Segment

Value = TypeVar("Value")


class LineWriter:
    """Appends values to a binary file and remembers where each one starts (8 bytes of memory a value)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def starts(self) -> Ints:
        """Where each line starts, in bytes, and last where the next one would: [num_lines + 1]."""
        return np.array(self._starts, dtype=np.int64)

    def append(self, value: Any) -> None:
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))


class Lines(Sequence[Value], Generic[Value]):
    """The values of such a file, decoded when they are asked for."""

    def __init__(self, file: IO[bytes], starts: Ints, *, decode: Callable[[Any], Value]) -> None:
        """Map a file that is written to its end; it may be closed and unlinked afterwards."""
        self._starts = starts
        self._decode = decode
        # An empty file cannot be mapped.
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if starts[-1] else b""

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._decode(json.loads(self._bytes[self._starts[at] : self._starts[at + 1]]))

    def __iter__(self) -> Iterator[Value]:
        return (self[index] for index in range(len(self)))


def example_to_json(example: Example) -> list[Any]:
    """An example as JSON values; its key as hexadecimal digits."""
    # Not dataclasses.astuple: it copies deeply, which cost a quarter of the preparation of 15,000 rows.
    segments = [(segment.text, segment.supervised, segment.control, segment.stop) for segment in example.segments]
    return [example.where, segments, example.question, example.response, example.category, example.key.hex()]


def example_from_json(values: Sequence[Any]) -> Example:
    """The example that `example_to_json` wrote."""
    where, segments, question, response, category, key = values
    return Example(
        where, tuple(Segment(*segment) for segment in segments), question, response, category, bytes.fromhex(key)
    )


class StoredExample:
    """An example whose key is at hand and whose text is on disk; about 0.15 kB of memory."""

    __slots__ = ("_index", "_spool", "key")

    def __init__(self, spool: ExampleSpool, index: int, key: bytes) -> None:
        self._spool, self._index, self.key = spool, index, key

    def load(self) -> Example:
        """Read it."""
        return self._spool.load(self._index)


class ExampleSpool:
    """Examples in a file without a name, which is gone with the process."""

    def __init__(self, directory: Path | None = None) -> None:
        """Make the file in `directory`, else where the system keeps temporary files ($TMPDIR)."""
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - as long as the examples are used
        weakref.finalize(self, self._file.close)
        self._writer = LineWriter(self._file)
        self._lines: Lines[Example] | None = None

    def add(self, example: Example) -> StoredExample:
        """Write an example behind the others."""
        self._writer.append(example_to_json(example))
        self._lines = None
        return StoredExample(self, len(self._writer) - 1, example.key)

    def load(self, index: int) -> Example:
        """Read the example that was added as number `index`, from 0."""
        if self._lines is None:
            self._file.flush()
            self._lines = Lines(self._file, self._writer.starts, decode=example_from_json)
        return self._lines[index]


class StoredExamples(Sequence[Example]):
    """Examples in an order of their own, read one by one."""

    def __init__(self, rows: Sequence[StoredExample]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [row.load() for row in self._rows[index]]
        return self._rows[index].load()
