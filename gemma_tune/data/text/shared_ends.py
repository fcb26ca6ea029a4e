"""Beginnings and ends that many texts share: end markers and headings of other tools, phrases, signatures."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

End = Literal["head", "tail"]
ENDS: tuple[End, ...] = ("head", "tail")
SAMPLE_TEXTS = 2_000  # what shared strings are looked for in
END_CHARS = 400  # of a text that are looked at
MIN_TEXTS = 5  # that share a string
# What no text of a person ends or begins with: few rows are enough to tell it.
_MARKER = re.compile(
    r"</?(?:s|bos|eos|pad|unk|sep|cls|mask|eot|eod|end|stop|human|user|assistant|model|bot|system|inst|sys|"
    r"im_start|im_end|start_of_turn|end_of_turn|start_header_id|end_header_id|endoftext|end_of_text)>|"
    r"<\|[^|<>\n]{1,40}\|>|<<?/?SYS>>?|\[/?(?:INST|SYS|BOS|EOS|PAD|UNK|SEP|CLS|END|STOP)\]|"
    r"#{2,} ?[\w ]{1,30}(?:#{2,}|:)",
    re.IGNORECASE,
)
_SYMBOLS = re.compile(r"[#<>|\[\]{}_=~^*\\]")
# White space and punctuation, and the ends of a block of code.
_FORM = re.compile(r"[\W_]*`{3}\w*|[\])}\"'`*_.,;:!? -]+")
_MARKER_SHARE, _SHARE, _WORD_SHARE = 0.1, 0.5, 0.9
_PHRASE_CHARS, _WORD_CHARS = 10, 3
_EXTENDS_SHARE = 0.9  # of the texts with a string have the longer one as well


def is_marker(text: str) -> bool:
    """Whether a shared string is a mark rather than words."""
    return bool(_MARKER.fullmatch(text)) or (len(text) >= _WORD_CHARS and bool(_SYMBOLS.search(text)))


class SharedEnds:
    """The beginnings and ends of texts, of which equal ones count once, so that labels share nothing."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._cut: dict[int, tuple[str, str]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a text, of which 800 characters are kept."""
        if stripped := text.strip():
            self._cut[hash(stripped)] = (stripped[: END_CHARS + 1], stripped[: -END_CHARS - 1 : -1])

    def find(self, end: End) -> list[str]:
        """Find what many of the texts begin (`head`) or end with, next to something of their own; the longest first."""
        texts = [tail if end == "tail" else head for head, tail in self._cut.values()]
        found = _longest(texts, 0, num_texts=len(texts), backward=end == "tail")
        return sorted((string for string, _ in found), key=lambda string: (-len(string), string))


def is_shared_enough(string: str, count: int, *, of: int) -> bool:
    """Whether a string that `count` texts of so many share is worth telling."""
    if _MARKER.fullmatch(string):
        share = _MARKER_SHARE
    elif len(string) < _WORD_CHARS or _FORM.fullmatch(string) or _is_of_json(string):
        return False
    else:
        share = _SHARE if is_marker(string) or len(string) >= _PHRASE_CHARS else _WORD_SHARE
    return count >= max(MIN_TEXTS, share * of)


def has_end(text: str, shared: str, end: End) -> bool:
    """Whether a text begins or ends with a shared string, white space aside, and holds more than it."""
    stripped = text.strip()
    return len(stripped) > len(shared) and (stripped.startswith(shared) if end == "head" else stripped.endswith(shared))


def strip_end(text: str, shared: str, end: End) -> str:
    """Remove a shared string, and the white space around it, from the beginning or the end of a text that has it."""
    if end == "tail":
        stripped = text.rstrip()
        return stripped.removesuffix(shared).rstrip() if stripped.endswith(shared) else text
    stripped = text.lstrip()
    return stripped.removeprefix(shared).lstrip() if stripped.startswith(shared) else text


def _longest(texts: list[str], depth: int, *, num_texts: int, backward: bool) -> list[tuple[str, int]]:
    """The longest shared strings, with their counts, below the first `depth` characters, which all of `texts` share."""
    # A chain of characters that nearly all share is followed without recursion.
    chain: list[tuple[int, list[str]]] = []
    while True:
        chain.append((depth, texts))
        branches: defaultdict[str, list[str]] = defaultdict(list)
        for text in texts:
            if len(text) > depth:
                branches[text[depth]].append(text)
        common = [branch for branch in branches.values() if len(branch) >= max(MIN_TEXTS, _MARKER_SHARE * num_texts)]
        if depth >= END_CHARS or not common:
            below: list[tuple[str, int]] = []
            break
        if len(common) > 1 or len(common[0]) < _EXTENDS_SHARE * len(texts):
            below = [
                found
                for branch in common
                for found in _longest(branch, depth + 1, num_texts=num_texts, backward=backward)
            ]
            break
        texts, depth = common[0], depth + 1
    for length, sharing in reversed(chain):
        if sum(count for _, count in below) >= _EXTENDS_SHARE * len(sharing):
            continue
        more = [text for text in sharing if len(text) > length]
        inward = sharing[0][:length]
        string = inward[::-1] if backward else inward
        if is_shared_enough(string, len(more), of=num_texts) and _is_at_a_border(inward, more, backward=backward):
            below = [(string, len(more))]
    return below


def _is_of_json(string: str) -> bool:
    """Whether a string opens a bracket that it does not close, or the reverse."""
    return string.count("[") + string.count("{") != string.count("]") + string.count("}")


def _is_at_a_border(inward: str, texts: Sequence[str], *, backward: bool) -> bool:
    """Whether a string, read inward from its end of the texts, stops between words and not behind white space."""
    last = inward[-1:]
    if not last or last.isspace() or (backward and last in ".,;:!?)'\"”’»") or (not backward and last in "(['\"“‘«"):
        return False
    within = sum(text[len(inward)].isalnum() for text in texts) if last.isalnum() else 0
    return within <= (1 - _EXTENDS_SHARE) * len(texts)
