"""The recipe's `data.clean`, applied to one row: its text before it is templated, and whether it is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gemma_tune.data.rows.render import Example
from gemma_tune.recipe.schema import CleanSection


class RowCleaner:
    """Applies a clean section to rows one by one; duplicates, which concern pairs of rows, are not its business."""

    def __init__(self, section: CleanSection) -> None:
        self._section = section
        self.changes_text = section.pii == "mask" or section.strip_citations or section.fix_encoding

    def fields(self, fields: Mapping[str, object]) -> dict[str, object]:
        """The row with every text in it cleaned, also inside lists of messages."""
        return {name: self._clean(value) for name, value in fields.items()}

    def reason_to_leave_out(self, texts: Iterable[tuple[str, str]], example: Example) -> str | None:
        """Why a rendered row is not used, in the words of the report, or None; `texts` as `Input.texts` gives them."""
        section = self._section
        if section.min_response_words or section.max_response_words:
            num_words = len(example.response.split())
            if section.min_response_words and num_words < section.min_response_words:
                return f"response under {section.min_response_words} words"
            if section.max_response_words and num_words > section.max_response_words:
                return f"response over {section.max_response_words} words"
        if section.pii == "drop":
            from gemma_tune.data.text.clean import has_pii

            if has_pii([text for _, text in texts]):
                return "personal data or a secret"
        return None

    def _clean(self, value: object) -> object:
        if isinstance(value, str):
            from gemma_tune.data.text.clean import clean_text

            return clean_text(
                value,
                mask_pii=self._section.pii == "mask",
                strip_citations=self._section.strip_citations,
                fix_encoding=self._section.fix_encoding,
            )
        if isinstance(value, list):
            return [self._clean(item) for item in value]
        if isinstance(value, Mapping):
            return {name: self._clean(item) for name, item in value.items()}
        return value
