"""Rows that occur twice, exactly or nearly.

Two rows are near duplicates when their texts share at least `NEAR_THRESHOLD` of their word 3-grams (Jaccard index of
the two sets; case, punctuation and white space do not count) and every value shares at least half of its words with its
counterpart: two questions about one long passage are two rows. MinHash finds the candidates, the sets decide.

What the threshold means: one word changed in a text of 50 gives 0.88 and is found, two that stand apart give 0.78 and
are not. A short text has few 3-grams: below 29 words one word changed in the middle makes another text, and below 11
any change does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

NEAR_THRESHOLD = 0.8
NGRAM_WORDS = 3
_MIN_SHARED_WORDS = 0.5
# A pair at the threshold is missed with the chance (1 - 0.8^4)^32 = 5e-8, a pair at 0.88 with 1e-13.
_BANDS = 32
_ROWS_PER_BAND = 4
# Three word numbers make one number of 63 bits; beyond two million different words some share a number.
_WORD_BITS = 21
# Chinese, Japanese and Thai are written without blanks: there a character counts as a word.
_WORDS = re.compile(r"[฀-๿぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_฀-๿぀-ヿ㐀-䶿一-鿿豈-﫿]+")

Progress = Callable[[int, int], None]
# The text values of a row, in the order of its fields, or its only text.
Texts = str | Sequence[str]


def exact_groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of rows with equal keys, only where there are several; groups and members in order."""
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return [group for group in members.values() if len(group) > 1]


def near_duplicate_groups(rows: Sequence[Texts], *, on_progress: Progress | None = None) -> list[list[int]]:
    """Indices of rows that are near duplicates of the first of their group; groups in the order of their first row.

    A row joins the earliest first row that it is near to, so that nothing is dropped for being near to a row that is
    dropped itself. Deterministic.
    """
    return Fingerprints(rows, on_progress=on_progress).groups(range(len(rows)))


def near_pairs(
    rows: Sequence[Texts], others: Sequence[Texts], *, on_progress: Progress | None = None
) -> list[tuple[int, int]]:
    """For every row that is a near duplicate of one of `others`: its index and the index of the first such one."""
    both = Fingerprints([*rows, *others], on_progress=on_progress)
    pairs = both.pairs(range(len(rows)), range(len(rows), len(rows) + len(others)))
    return [(row, other - len(rows)) for row, other in pairs]


class Fingerprints:
    """Word 3-grams and MinHash of rows, so that any two of them can be compared; rows are known by their index.

    A row without a word is near to nothing.
    """

    def __init__(self, rows: Sequence[Texts], *, on_progress: Progress | None = None) -> None:
        import numpy as np
        from datasketch import MinHash

        self._vocabulary: dict[str, int] = {}
        self._fields: list[list[Any]] = []
        self._ngrams: list[Any] = []
        self._hashes: list[Any] = []
        empty = MinHash(num_perm=_BANDS * _ROWS_PER_BAND, seed=1, hashfunc=int, scheme="affine64")
        for number, texts in enumerate(rows, start=1):
            # A field that one of two rows leaves out and the other leaves empty is the same field.
            values = (texts,) if isinstance(texts, str) else texts
            fields = [ids for ids in map(self._word_ids, values) if ids]
            words = np.array([word for ids in fields for word in ids], dtype=np.uint64)
            ngrams = _ngrams(words)
            minhash = empty.copy()
            minhash.update_batch(ngrams.tolist())
            self._fields.append([np.array(ids, dtype=np.uint32) for ids in fields])
            self._ngrams.append(ngrams)
            self._hashes.append(minhash)
            if on_progress and (number % 500 == 0 or number == len(rows)):
                on_progress(number, len(rows))

    def groups(self, rows: Iterable[int]) -> list[list[int]]:
        """As `near_duplicate_groups`, among the given rows."""
        index = _make_index()
        groups: dict[int, list[int]] = {}
        for row in rows:
            if not self._fields[row]:
                continue
            near = (first for first in sorted(index.query(self._hashes[row])) if self.are_near(first, row))
            first = next(near, None)
            if first is None:
                index.insert(row, self._hashes[row])
            else:
                groups.setdefault(first, [first]).append(row)
        return [groups[first] for first in sorted(groups)]

    def pairs(self, rows: Iterable[int], others: Iterable[int]) -> list[tuple[int, int]]:
        """As `near_pairs`, between the given rows."""
        # The side that is asked about goes into the index, so that many equal others cost no more than one.
        index = _make_index()
        for row in rows:
            if self._fields[row]:
                index.insert(row, self._hashes[row])
        found: dict[int, int] = {}
        for other in others:
            for row in index.query(self._hashes[other]) if self._fields[other] else ():
                if row not in found and self.are_near(row, other):
                    found[row] = other
        return sorted(found.items())

    def are_near(self, row: int, other: int) -> bool:
        """The exact test behind MinHash's guess."""
        import numpy as np

        first, second = self._ngrams[row], self._ngrams[other]
        # The smaller set cannot share more than all of itself.
        if min(len(first), len(second)) < NEAR_THRESHOLD * max(len(first), len(second)):
            return False
        shared = len(np.intersect1d(first, second, assume_unique=True))
        if shared < NEAR_THRESHOLD * (len(first) + len(second) - shared):
            return False
        fields = self._fields[row], self._fields[other]
        return len(fields[0]) == len(fields[1]) and all(
            _shared_words(one.tolist(), two.tolist()) >= _MIN_SHARED_WORDS for one, two in zip(*fields, strict=True)
        )

    def _word_ids(self, text: str) -> list[int]:
        vocabulary = self._vocabulary
        return [vocabulary.setdefault(word, len(vocabulary)) for word in _WORDS.findall(text.lower())]


def _make_index() -> Any:
    from datasketch import MinHashLSH

    return MinHashLSH(num_perm=_BANDS * _ROWS_PER_BAND, params=(_BANDS, _ROWS_PER_BAND))


def _ngrams(words: Any) -> Any:
    """The distinct 3-grams of word numbers, each as one number; a shorter text is one n-gram of its own."""
    import numpy as np

    if len(words) < NGRAM_WORDS:
        # 2^21 - 1 stands for no word, so that a text of two words equals no 3-gram.
        words = np.concatenate([words, np.full(NGRAM_WORDS - len(words), 2**_WORD_BITS - 1, dtype=np.uint64)])
    words = words & np.uint64(2**_WORD_BITS - 1)
    shift, double_shift = np.uint64(_WORD_BITS), np.uint64(2 * _WORD_BITS)
    return np.unique(words[:-2] << double_shift | words[1:-1] << shift | words[2:])


def _shared_words(one: list[int], two: list[int]) -> float:
    """Twice the words in common over the words of both, each counted as often as it stands."""
    return 2 * (Counter(one) & Counter(two)).total() / (len(one) + len(two))
