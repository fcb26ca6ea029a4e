"""Damage and marks in row text: mojibake, and the citation marks that encyclopedia text brings along."""

import re
from collections.abc import Iterator

REPLACEMENT_CHARACTER = "�"
_SNIPPET_CHARS = 24


# --- encoding ---------------------------------------------------------------------------------------------------------


def encoding_damage(text: str) -> str | None:
    """The first damaged characters of the text, at most 24; None where there is no damage.

    Damage is what `ftfy` takes for UTF-8 that was decoded as something else (`CafÃ©`), and the replacement character.
    """
    if text.isascii():
        return None
    from ftfy.badness import BADNESS_RE

    match = BADNESS_RE.search(text)
    at = match.start() if match else text.find(REPLACEMENT_CHARACTER)
    return None if at < 0 else text[at : match.end() if match else at + 1][:_SNIPPET_CHARS]


def fix_encoding(text: str) -> str:
    """Undo mojibake and change nothing else: quotes, widths, ligatures, line ends and normal form stay."""
    if text.isascii():
        return text
    import ftfy

    return ftfy.fix_text(
        text,
        unescape_html=False,
        remove_terminal_escapes=False,
        # It would put the replacement character for a sequence that has lost a byte: other damage, not a repair.
        replace_lossy_sequences=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


# --- citation marks ---------------------------------------------------------------------------------------------------

# What Wikipedia's editors put in brackets. These words mean nothing else, whatever stands before them.
_EDITORIAL = (
    r"(?i:(?:citation|clarification|page|year|quote|verification|attribution|better source|full citation|"
    r"additional citation\(?s?\)?) needed|who\?|when\?|which\?|where\?|according to whom\?|by whom\?|dubious|"
    r"original research\??|failed verification|dead link|permanent dead link|unreliable source\??|"
    r"(?:note|nb|n|fn) [0-9]{1,3})"
)
# A range has the dash of typesetting; `file[1-2]` is a pattern of file names.
_NUMBERS = r"[1-9][0-9]{0,2}(?: ?[,–] ?[1-9][0-9]{0,2}){0,5}"
_MARK = re.compile(
    rf"\[(?:(?P<editorial>{_EDITORIAL})|(?P<numbers>{_NUMBERS})|(?P<letter>[a-z]))\]"
    # `[1](https://…)` and `[1]: https://…` are Markdown links.
    r"(?![(:])"
)
_CODE = re.compile(
    r"```|^\s*(?:def|class|import|from|for|while|if|return|let|const|var|int|void|#include|public|SELECT)\b.*[:;({]\s*$"
    r"|;\s*$|\w\(\)|[=!<>]=|\w\s?=\s?[\[\w\"'(]|\[0\]|\w\[[a-z]\w*\]\s?[=\[]|print\s?\(",
    re.MULTILINE,
)
_CLOSING = ".,;:!?)\"”'’»%…"
_WORD_END = re.compile(r"[\w']+$")
# What stands behind a mark in prose: a blank and a word, a sign that ends something, another mark, or nothing.
_BEHIND = re.compile(r"\s*$|\s+[\w(\"“'‘—–-]|[.,;:!?)\"”'’—–-]|\[|(?<=[.!?]\])[A-Z]")


def citation_marks(text: str) -> list[tuple[int, int]]:
    """Start and end of every citation mark: `[1]`, `[2][3]`, `[4–6]`, `[note 1]`, `[citation needed]`.

    A number in brackets is a mark behind the end of a word or a sentence in prose. It is none in text that looks like
    code, nor where one name is followed by several numbers (`a[1] and a[2]`), nor behind a blank (a list, a
    bibliography).
    """
    if "[" not in text:
        return []
    found = list(_MARK.finditer(text))
    if not found:
        return []
    is_code = _CODE.search(text) is not None
    indexed = set() if is_code else _indexed_names(text)
    return list(_marks(text, found, is_code=is_code, indexed=indexed))


_AFTER_NO_BLANK = " .,;:!?)\n"


def strip_citations(text: str) -> str:
    """Remove every citation mark, with the blank before one that would stand before a blank, a stop or the end."""
    while marks := citation_marks(text):
        for start, end in reversed(marks):
            before = text[:start]
            if before.endswith(" ") and (end == len(text) or text[end] in _AFTER_NO_BLANK):
                before = before[:-1]
            text = before + text[end:]
    return text


def _marks(text: str, found: list[re.Match[str]], *, is_code: bool, indexed: set[str]) -> Iterator[tuple[int, int]]:
    end_of_last = -1
    for match in found:
        start, end = match.span()
        if match["editorial"] is None:
            if is_code or not start or not _BEHIND.match(text, end):
                continue
            before = text[start - 1]
            follows_sign = before in _CLOSING or start == end_of_last
            if not follows_sign:
                word = _WORD_END.search(text, max(0, start - 40), start)
                if not before.isalnum() or match["letter"] or (word and word[0] in indexed):
                    continue
        end_of_last = end
        yield start, end


_INDEXED = re.compile(r"([A-Za-z_]\w*)\[([0-9]+)\]")


def _indexed_names(text: str) -> set[str]:
    """Names that stand before several numbers, and names of one letter: arrays, not cited words."""
    numbers: dict[str, set[str]] = {}
    for name, number in _INDEXED.findall(text):
        numbers.setdefault(name, set()).add(number)
    return {name for name, found in numbers.items() if len(found) > 1 or len(name) == 1}
