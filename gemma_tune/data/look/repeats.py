"""Rows that occur twice, and eval rows that are trained on, exactly or nearly."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gemma_tune.data.look.findings import AuditRow, Finds
from gemma_tune.data.rows.divide import firsts_of, number_keys
from gemma_tune.data.text.duplicates import NearDuplicates


def find_repeats(
    rows: Sequence[AuditRow],
    near: NearDuplicates,
    found: Finds,
    *,
    keys: bytes | bytearray,
    is_eval: npt.NDArray[np.bool_],
) -> None:
    """Compare rows on each side and between the sides.

    `near` has all rows; `keys` are theirs, one behind the other; `is_eval`: [num_rows].
    """
    numbers = number_keys(keys)
    first_rows: list[npt.NDArray[np.int64]] = []  # of each key number on the train side, and on the eval side; or -1
    for side in (~is_eval, is_eval):
        own = np.flatnonzero(side)
        distinct = firsts_of(own, numbers)
        first = np.full(len(rows), -1)
        first[numbers[distinct]] = distinct
        first_rows.append(first)
        again = own[first[numbers[own]] != own]
        for row in again[np.argsort(first[numbers[again]], kind="stable")].tolist():
            found.add("duplicate_exact", rows[row].where, f"the same as {rows[first[numbers[row]]].where}")
        for group in near.groups(distinct.tolist()):
            for row in group[1:]:
                found.add("duplicate_near", rows[row].where, f"nearly the same as {rows[group[0]].where}")
    trained, asked = (first[numbers] for first in first_rows)  # of each row: the first equal one of a side, or -1
    for row in np.flatnonzero(is_eval & (trained >= 0)).tolist():
        found.add("leak_exact", rows[row].where, f"the same as {rows[trained[row]].where} of the training rows")
    # Each distinct row once; exact duplicates and exact leaks have been told above.
    own_asked = np.flatnonzero((asked == np.arange(len(rows))) & (trained < 0))
    own_trained = np.flatnonzero(trained == np.arange(len(rows)))
    for row, other in near.pairs(own_asked.tolist(), own_trained.tolist()):
        found.add("leak_near", rows[row].where, f"nearly the same as {rows[other].where} of the training rows")
