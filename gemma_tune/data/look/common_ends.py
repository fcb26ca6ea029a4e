"""What answers and prompts of many rows begin or end with: looked for in a sample, counted in all rows."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from gemma_tune.data.look.findings import FINDING_KINDS, AuditFinding, AuditRow, Hits
from gemma_tune.data.text.pii import mask_pii
from gemma_tune.data.text.shared_ends import ENDS, SharedEnds, has_end, is_marker, is_shared_enough

_SIDES = {True: "answer", False: "prompt"}
_MOST_TEXTS = 8  # of a column and row that go into the sample


class CommonEnds:
    """Shared beginnings and ends, and the rows that have them."""

    def __init__(self, sample: Iterable[AuditRow]) -> None:
        """Look for them in each column by itself."""
        columns: defaultdict[tuple[bool, str], SharedEnds] = defaultdict(SharedEnds)
        for row in sample:
            num_texts: defaultdict[tuple[bool, str], int] = defaultdict(int)
            for (name, text), is_learned in zip(row.texts, row.learned, strict=True):
                # A column of messages is named messages[0], messages[1] and so on.
                column = (is_learned, name.partition("[")[0])
                num_texts[column] += 1
                if num_texts[column] <= _MOST_TEXTS:
                    columns[column].add(text)
        self._hits = {
            (is_learned, end, shared): Hits()
            for (is_learned, _), texts in columns.items()
            for end in ENDS
            for shared in texts.find(end)
        }

    def count(self, row: AuditRow) -> None:
        """Count a row for each of them that one of its texts has."""
        for (name, text), is_learned in zip(row.texts, row.learned, strict=True):
            for (of_answers, end, shared), hits in self._hits.items():
                if of_answers == is_learned and has_end(text, shared, end):
                    hits.add(row.where, name)

    def findings(self, num_rows: int) -> list[AuditFinding]:
        """Those that enough of all rows have; words, which may be meant, are no more than mentioned."""
        found = []
        for (is_learned, end, shared), hits in self._hits.items():
            if not is_shared_enough(shared, hits.count, of=num_rows):
                continue
            quoted = json.dumps(mask_pii(shared), ensure_ascii=False)
            finding = FINDING_KINDS[f"shared_{_SIDES[is_learned]}_{end}"].finding(
                hits.count, tuple(hits.samples), hits.places.compact(), shared=quoted, share=hits.count / num_rows
            )
            found.append(finding if is_marker(shared) else replace(finding, severity="info"))
        return found
