from __future__ import annotations

import pytest

from gemma_tune.data.text.damage import citation_marks, encoding_damage, fix_encoding, strip_citations


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("CafÃ© au lait", "Café au lait"),
        ("Itâ€™s here", "It’s here"),
        ("NaÃ¯ve rÃ©sumÃ©\r\nfine", "Naïve résumé\r\nfine"),
    ],
)
def test_mojibake_is_found_and_mended(text: str, mended: str) -> None:
    assert encoding_damage(text)
    assert fix_encoding(text) == mended
    assert encoding_damage(mended) is None


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "“curly” ‘quotes’ – and … ﬁne",
        "ｆｕｌｌ ｗｉｄｔｈ",
        "e\u0301 stays decomposed",
        "a &amp; b \x1b[1mbold\x1b[0m \u200b",
        "Ähnliche Größe, naïve Ångström, Übergröße",
        "日本語のテキスト, Русский текст, العربية",
    ],
)
def test_sound_text_is_left_alone(text: str) -> None:
    assert encoding_damage(text) is None
    assert fix_encoding(text) == text


def test_replacement_character_is_damage_that_cannot_be_mended() -> None:
    assert encoding_damage("what\ufffd now") == "\ufffd"
    assert fix_encoding("what\ufffd now") == "what\ufffd now"


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("It opened in 1901.[1] It closed later.", "It opened in 1901. It closed later."),
        ("It opened in 1901[1] and closed[12] later,[3][4] they say.", "It opened in 1901 and closed later, they say."),
        ("The thin shell.[citation needed]\n\nNext", "The thin shell.\n\nNext"),
        ("A town.[2–4] B.[5, 7] “C”[8]", "A town. B. “C”"),
        ("Here[note 1] and there.[a]", "Here and there."),
        ("the end[9]", "the end"),
        ("(in English)[10], with", "(in English), with"),
    ],
)
def test_citations_are_stripped(text: str, stripped: str) -> None:
    assert strip_citations(text) == stripped
    assert citation_marks(stripped) == []


@pytest.mark.parametrize(
    "text",
    [
        "a[1] is the second item",
        "x = values[1]",
        "Swap arr[1] and arr[2], then return.",
        "```python\nnumbers = [1]\nprint(numbers[1])\n```",
        "for (int k = 1; k < n; k++) {\n  total += row[1];\n}",
        "matrix m[1][2] in C",
        "The answer is [1].",
        "[1] Smith, J. (1999). A book.",
        "see [this][1] and [1](https://example.com) or word[1](x)",
        "[1]: https://example.com",
        "[insert name] wrote [date]",
        "intervals [1, 2] and [0, 1]",
        "the sequence [1], [2], [3]",
        "all of file[1-2] and *.[1-9]",
    ],
)
def test_brackets_that_are_no_citation(text: str) -> None:
    assert citation_marks(text) == []
    assert strip_citations(text) == text
