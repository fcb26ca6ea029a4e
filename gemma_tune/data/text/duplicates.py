"""Rows that occur twice, exactly or nearly.

Two rows are near duplicates when their texts share at least `NEAR_THRESHOLD` of their word 3-grams (Jaccard index of
the two sets; case, punctuation and white space do not count) and every value shares at least half of its words with its
counterpart: two questions about one long passage are two rows. MinHash (Broder 1997) with banding finds the candidates,
whose texts are read again and compared. 128 bytes of a row stay in memory, and 12 more for every band of 32 that it
shares with another row.

What the threshold means: one word changed in a text of 50 gives 0.88 and is found, two that stand apart give 0.78 and
are not. A short text has few 3-grams: below 29 words one word changed in the middle makes another text, and below 11
any change does.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

NEAR_THRESHOLD = 0.8
NGRAM_WORDS = 3
_MIN_SHARED_WORDS = 0.5
# A pair at the threshold is missed with the chance (1 - 0.8^4)^32 = 5e-8, a pair at 0.88 with 1e-13.
_BANDS = 32
_ROWS_PER_BAND = 4
# What is hashed at once: its arrays stay in the processor's cache, and a set of long rows is still not whole in memory.
_BATCH_ROWS, _BATCH_WORDS = 500, 100_000
# Compared again and again is the first row of a group, so few rows are kept.
_KEPT_ROWS = 256
# Chinese, Japanese and Thai are written without blanks: there a character counts as a word.
_WORDS = re.compile(r"[฀-๿぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_฀-๿぀-ヿ㐀-䶿一-鿿豈-﫿]+")

UInt64s = npt.NDArray[np.uint64]


class NearDuplicates:
    """Finds near duplicates among rows that are added one by one; a row without a word is near to nothing.

    `groups` and `pairs` may be called once all rows are there. Deterministic.
    """

    def __init__(self, num_rows: int, *, read: Callable[[int], Sequence[str]]) -> None:
        """Make room for `num_rows` rows; `read` gives the text values of an added row, by its number."""
        self._bands = np.empty((_BANDS, num_rows), dtype=np.uint32)
        self._num_added = 0
        self._batch: list[list[int]] = []
        self._batch_words = 0
        self._buckets: npt.NDArray[np.int32] | None = None
        self._num_buckets = 0
        self._words = lru_cache(_KEPT_ROWS)(lambda row: _words_of(read(row)))

    def add(self, texts: Iterable[str]) -> None:
        """Add a row by its text values, in the order of its fields."""
        words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for text in texts for word in _split(text)]
        self._batch.append(words)
        self._batch_words += len(words)
        if len(self._batch) == _BATCH_ROWS or self._batch_words >= _BATCH_WORDS:
            self._hash_batch()

    def groups(self, rows: Iterable[int]) -> list[list[int]]:
        """Rows that are near duplicates of the first of their group, of those given; groups in the order of the first.

        A row joins the earliest first row that it is near to, so that nothing is dropped for being near to a row that
        is dropped itself.
        """
        firsts = self._make_index()
        groups: dict[int, list[int]] = {}
        for row, buckets in self._sharing(rows):
            first = next((first for first in sorted(firsts.find(buckets)) if self._are_near(first, row)), None)
            if first is None:
                firsts.insert(row, buckets)
            else:
                groups.setdefault(first, [first]).append(row)
        return [groups[first] for first in sorted(groups)]

    def pairs(self, rows: Iterable[int], others: Iterable[int]) -> list[tuple[int, int]]:
        """Every one of `rows` that is a near duplicate of one of `others`, with the first such one."""
        # The side that is asked about goes into the index, so that many equal others cost no more than one.
        index = self._make_index()
        for row, buckets in self._sharing(rows):
            index.insert(row, buckets)
        found: dict[int, int] = {}
        for other, buckets in self._sharing(others):
            for row in index.find(buckets):
                if row not in found and self._are_near(row, other):
                    found[row] = other
        return sorted(found.items())

    def _are_near(self, row: int, other: int) -> bool:
        """Compare two rows, word by word."""
        one, two = self._words(row), self._words(other)
        shared = len(one.ngrams & two.ngrams)
        if shared < NEAR_THRESHOLD * (len(one.ngrams) + len(two.ngrams) - shared):
            return False
        return len(one.fields) == len(two.fields) and all(
            2 * (first & second).total() >= _MIN_SHARED_WORDS * (first.total() + second.total())
            for first, second in zip(one.fields, two.fields, strict=True)
        )

    def _hash_batch(self) -> None:
        if self._batch:
            end = self._num_added + len(self._batch)
            self._bands[:, self._num_added : end] = _hash_bands(self._batch)
            self._num_added, self._batch, self._batch_words = end, [], 0

    def _make_index(self) -> _Index:
        self._hash_batch()
        if self._buckets is None:
            self._buckets, self._num_buckets = _number_buckets(self._bands[:, : self._num_added])
        return _Index(self._num_buckets)

    def _sharing(self, rows: Iterable[int]) -> Iterable[tuple[int, list[int]]]:
        """Those of the rows that share a bucket with another, each with these buckets."""
        assert self._buckets is not None
        is_shared = self._buckets.max(axis=0, initial=-1) >= 0
        for row in rows:
            if is_shared[row]:
                own = self._buckets[:, row]
                yield row, own[own >= 0].tolist()


class _Index:
    """Rows by bucket. Chains in flat arrays: a dictionary of lists takes twenty times the memory."""

    def __init__(self, num_buckets: int) -> None:
        self._last = array("i", [-1]) * num_buckets
        self._rows, self._before = array("i"), array("i")

    def insert(self, row: int, buckets: Iterable[int]) -> None:
        for bucket in buckets:
            self._before.append(self._last[bucket])
            self._last[bucket] = len(self._rows)
            self._rows.append(row)

    def find(self, buckets: Iterable[int]) -> set[int]:
        """Every row that was put into one of the buckets."""
        found = set()
        for bucket in buckets:
            at = self._last[bucket]
            while at >= 0:
                found.add(self._rows[at])
                at = self._before[at]
        return found


@dataclass(frozen=True, slots=True)
class _RowWords:
    """A row for comparison: the words of its values that have any, counted, and its distinct n-grams across them.

    A text of fewer words than an n-gram has is one n-gram of its own.
    """

    fields: list[Counter[str]]
    ngrams: set[tuple[str, ...]]


def _split(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _words_of(texts: Sequence[str]) -> _RowWords:
    # A field that one of two rows leaves out and the other leaves empty is the same field.
    fields = [words for words in map(_split, texts) if words]
    words = list(chain.from_iterable(fields))
    starts = range(max(1, len(words) - NGRAM_WORDS + 1))
    return _RowWords([Counter(words) for words in fields], {tuple(words[at : at + NGRAM_WORDS]) for at in starts})


# --- MinHash ----------------------------------------------------------------------------------------------------------

_NO_WORD = 2**32  # beyond every CRC-32


def _mix(values: UInt64s) -> UInt64s:
    """Make every bit depend on every other: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_NUMBERS = np.arange(1, 2 * _BANDS * _ROWS_PER_BAND + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_FACTORS, _SUMMANDS = np.split(_mix(_NUMBERS), 2)
_FACTORS = _FACTORS | np.uint64(1)


def _hash_bands(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.uint32]:
    """Hash the n-grams of rows of hashed words: [_BANDS, num_rows]; 0 in every band of a row without words."""
    # Filled up, so that a row of one or two words has an n-gram, and one of no word does not disturb the others.
    filled = [[*words, *[_NO_WORD] * (NGRAM_WORDS - len(words))] for words in rows]
    lengths = np.array([len(words) for words in filled], dtype=np.int64)
    words = np.fromiter(chain.from_iterable(filled), dtype=np.uint64, count=int(lengths.sum()))
    ngrams = _mix(_mix(_mix(words[:-2]) + words[1:-1]) + words[2:])
    ends = np.cumsum(lengths)
    is_within_row = np.ones(len(words), dtype=np.bool_)
    is_within_row[np.concatenate([ends - 1, ends - 2])] = False
    ngrams = ngrams[is_within_row[:-2]]
    starts = ends - lengths - 2 * np.arange(len(rows))
    bands = np.zeros((_BANDS, len(rows)), dtype=np.uint64)
    for at, (factor, summand) in enumerate(zip(_FACTORS, _SUMMANDS, strict=True)):
        smallest = np.minimum.reduceat((ngrams * factor + summand) >> np.uint64(32), starts)
        bands[at // _ROWS_PER_BAND] = _mix(bands[at // _ROWS_PER_BAND] + smallest)
    bands[:, [not row for row in rows]] = 0
    return (bands >> np.uint64(32)).astype(np.uint32)


def _number_buckets(bands: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.int32], int]:
    """Number the buckets, in place of the hashes (-1 where a row is alone or has no words), and count them."""
    buckets, num_buckets = bands.view(np.int32), 0
    for hashes, numbers in zip(bands, buckets, strict=True):
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
        sizes = np.diff(starts, append=len(ordered))
        is_shared = (sizes > 1) & (ordered[starts] != 0)
        numbers[order] = np.repeat(np.where(is_shared, np.cumsum(is_shared) - 1 + num_buckets, -1), sizes)
        num_buckets += int(is_shared.sum())
    return buckets, num_buckets
