"""What is kept on disk while it is worked on, so that a set of rows may be larger than memory.

Values are written as JSON, a line each, and read back one by one; nothing of the file is mapped, so that what was read
does not count as memory of the process.
"""

import json
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np

from gemma_tune.data.encode.arrays import Ints
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.segments import Segment

Value = TypeVar("Value")


class LineWriter:
    """Appends values to a binary file; keeps 8 bytes of memory a value."""

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
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))


class LazySequence(Sequence[Value], Generic[Value]):
    """Values that are read when they are asked for; a slice is a list of them."""

    @abstractmethod
    def read(self, index: int) -> Value:
        """Read the value at `index`, which is from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        at = range(len(self))[index]
        return self.read(at) if isinstance(at, int) else list(map(self.read, at))


class Lines(LazySequence[Value]):
    """The values of such a file, decoded when they are asked for."""

    def __init__(self, file: IO[bytes], starts: Ints, *, decode: Callable[[Any], Value]) -> None:
        """Take a file that is written to its end; it may be closed and unlinked afterwards."""
        self._starts = starts
        self._decode = decode
        self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> Value:
        start, end = self._starts[index : index + 2].tolist()
        return self._decode(json.loads(os.pread(self._file, end - start, start)))


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


class Spool(LazySequence[Value]):
    """Values that grow in number, in a file without a name, which is gone with the process."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        encode: Callable[[Value], Any] = lambda value: value,
        decode: Callable[[Any], Value] = lambda value: value,
    ) -> None:
        """Make the file in `directory`, else where the system keeps temporary files ($TMPDIR)."""
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - as long as the values are used
        weakref.finalize(self, self._file.close)
        self._writer = LineWriter(self._file)
        self._encode, self._decode = encode, decode
        self._lines: Lines[Value] | None = None

    def append(self, value: Value) -> None:
        """Write a value behind the others."""
        self._writer.append(self._encode(value))
        self._lines = None

    def __len__(self) -> int:
        return len(self._writer)

    def read(self, index: int) -> Value:
        if self._lines is None:
            self._file.flush()
            self._lines = Lines(self._file, self._writer.starts, decode=self._decode)
        return self._lines.read(index)


class ExampleSpool(Spool[Example]):
    """Examples on disk, and their keys, one behind the other, in memory."""

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory, encode=example_to_json, decode=example_from_json)
        self.keys = bytearray()

    def append(self, value: Example) -> None:
        """Write an example behind the others."""
        super().append(value)
        self.keys += value.key


class Chosen(LazySequence[Value]):
    """Values of a sequence in an order of their own, read one by one."""

    def __init__(self, values: Sequence[Value], indices: Ints) -> None:
        """Choose the values at `indices`, any number of times each."""
        self._values, self._indices = values, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Value:
        return self._values[int(self._indices[index])]
