from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.rows.cleaner import RowCleaner
from gemma_tune.data.rows.render import Example
from gemma_tune.recipe.schema import CleanSection

TEXT = "CafÃ© Elm opened in 1901.[1] Write to elm@example.com."
FLAGS = list(itertools.product((False, True), repeat=3))


def clean_text(text: str, *, mask_pii: bool, strip_citations: bool, fix_encoding: bool) -> str:
    section = CleanSection(
        pii="mask" if mask_pii else "keep", strip_citations=strip_citations, fix_encoding=fix_encoding
    )
    return RowCleaner(section).clean_text(text)


def has_pii(texts: list[str]) -> bool:
    example = Example("rows.jsonl:1", (), "", "", None, b"")
    reason = RowCleaner(CleanSection(pii="drop")).reason_to_leave_out([("response", text) for text in texts], example)
    assert reason in (None, "personal data or a secret")
    return reason is not None


def test_each_option_does_its_own() -> None:
    off = {"mask_pii": False, "strip_citations": False, "fix_encoding": False}
    assert clean_text(TEXT, **off) == TEXT
    assert clean_text(TEXT, **off | {"mask_pii": True}) == TEXT.replace("elm@example.com", "[EMAIL]")
    assert clean_text(TEXT, **off | {"strip_citations": True}) == TEXT.replace("[1]", "")
    assert clean_text(TEXT, **off | {"fix_encoding": True}) == TEXT.replace("Ã©", "é")


def test_cleanings_work_together() -> None:
    text = "Write to jane@example[citation needed].com or to the CafÃ[citation needed]©."
    cleaned = clean_text(text, mask_pii=True, strip_citations=True, fix_encoding=True)
    assert cleaned == "Write to [EMAIL] or to the Café."


def test_has_pii() -> None:
    assert has_pii(["nothing", "jane@example.com"])
    assert not has_pii(["nothing", "[EMAIL]", "2001-2003"])
    assert not has_pii([])


pieces = st.one_of(
    st.sampled_from(
        ["[1]", "[citation needed]", "Ã©", "â€™", "jane@example.com", "+49 30 901820", "town", ".", "\ufffd"]
    ),
    st.sampled_from(
        ["4111 1111 1111 1111", "93.184.216.34", "(212) 555-0123", "a[1]", "```", "[EMAIL]", " ", "Â ", "Ã "]
    ),
    st.text(max_size=6),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=10), st.sampled_from(FLAGS))
def test_cleaning_twice_changes_nothing(parts: list[str], flags: tuple[bool, bool, bool]) -> None:
    options = dict(zip(("mask_pii", "strip_citations", "fix_encoding"), flags, strict=True))
    once = clean_text("".join(parts), **options)
    assert clean_text(once, **options) == once
    if options["mask_pii"]:
        assert not has_pii([once])
