"""The recipe's `data.clean`, applied to one row: its text before it is templated, and whether it is left out."""

from collections import Counter
from collections.abc import Iterable, Mapping

from gemma_tune.data.rows.render import Example
from gemma_tune.data.text import damage
from gemma_tune.data.text import pii as personal
from gemma_tune.data.text.shared_ends import End, strip_end
from gemma_tune.recipe.schema import CleanSection


class RowCleaner:
    """Applies a clean section to rows one by one; duplicates, which concern pairs of rows, are not its business."""

    def __init__(self, section: CleanSection) -> None:
        self._section = section
        self._ends: dict[tuple[End, str], bool] = {  # and whether the row that is being cleaned had it
            **{("head", shared): False for shared in section.strip_heads},
            **{("tail", shared): False for shared in section.strip_tails},
        }
        self.stripped: Counter[str] = Counter({shared: 0 for _, shared in self._ends})  # rows that had it
        self.changes_text = bool(section.pii == "mask" or section.strip_citations or section.fix_encoding or self._ends)

    def fields(self, fields: Mapping[str, object]) -> dict[str, object]:
        """The row with every text in it cleaned, also inside lists of messages."""
        self._ends = dict.fromkeys(self._ends, False)
        cleaned = {name: self._clean(value) for name, value in fields.items()}
        self.stripped.update(shared for (_, shared), was_there in self._ends.items() if was_there)
        return cleaned

    def reason_to_leave_out(self, texts: Iterable[tuple[str, str]], example: Example) -> str | None:
        """Why a rendered row is not used, in the words of the report, or None; `texts` as `Input.texts` gives them."""
        section = self._section
        if section.min_response_words or section.max_response_words:
            num_words = len(example.response.split())
            if section.min_response_words and num_words < section.min_response_words:
                return f"response under {section.min_response_words} words"
            if section.max_response_words and num_words > section.max_response_words:
                return f"response over {section.max_response_words} words"
        if section.pii == "drop" and any(personal.find_pii(text) for _, text in texts):
            return "personal data or a secret"
        return None

    def _clean(self, value: object) -> object:
        if isinstance(value, str):
            return self.clean_text(value)
        if isinstance(value, list):
            return [self._clean(item) for item in value]
        if isinstance(value, Mapping):
            return {name: self._clean(item) for name, item in value.items()}
        return value

    def clean_text(self, text: str) -> str:
        """The text after the section's cleanings; cleaning it again changes nothing."""
        # One cleaning can make room for another: a citation mark may stand inside an e-mail address.
        while (cleaned := self._clean_once(text)) != text:
            text = cleaned
        return text

    def _clean_once(self, text: str) -> str:
        if self._section.fix_encoding:
            text = damage.fix_encoding(text)
        if self._section.strip_citations:
            text = damage.strip_citations(text)
        for end, shared in self._ends:
            stripped = strip_end(text, shared, end)
            self._ends[end, shared] |= stripped != text
            text = stripped
        return personal.mask_pii(text) if self._section.pii == "mask" else text
