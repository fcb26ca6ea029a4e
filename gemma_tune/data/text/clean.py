"""Cleaning of row text as `data.clean` asks for it; the audit shows what there is to clean."""

from __future__ import annotations

from collections.abc import Iterable

from gemma_tune.data.text.damage import fix_encoding as mend_encoding
from gemma_tune.data.text.damage import strip_citations as without_citations
from gemma_tune.data.text.pii import find_pii, mask_pii


def clean_text(text: str, *, mask_pii: bool, strip_citations: bool, fix_encoding: bool) -> str:
    """The text after the given cleanings; cleaning it again changes nothing."""
    # One cleaning can make room for another: a citation mark may stand inside an e-mail address.
    while (cleaned := _clean_once(text, pii=mask_pii, citations=strip_citations, encoding=fix_encoding)) != text:
        text = cleaned
    return text


def has_pii(texts: Iterable[str]) -> bool:
    return any(find_pii(text) for text in texts)


def _clean_once(text: str, *, pii: bool, citations: bool, encoding: bool) -> str:
    if encoding:
        text = mend_encoding(text)
    if citations:
        text = without_citations(text)
    return mask_pii(text) if pii else text
