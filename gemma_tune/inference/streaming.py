"""Text that is passed on while it is generated."""

from collections.abc import Callable, Sequence

OnText = Callable[[str], None]
# Called with how many are done, and of how many.
OnProgress = Callable[[int, int], None]


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string in it, and whether there is one."""
    found = [at for string in stop_strings if (at := text.find(string)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


class StreamedText:
    """Passes text on as soon as it is sure to stay: no stop string in it, and no white space at its ends.

    What was passed on altogether is the text of the finished `Completion`.
    """

    def __init__(self, on_text: OnText, stop_strings: Sequence[str]) -> None:
        self._on_text = on_text
        self._stop_strings = stop_strings
        self._held = ""
        self._has_begun = False
        self._has_ended = False

    def add(self, text: str, *, is_last: bool = False) -> None:
        """Take the next piece; with `is_last` nothing is held back any longer."""
        if self._has_ended:
            return
        self._held, self._has_ended = cut_at_stop(self._held + text, self._stop_strings)
        is_last = is_last or self._has_ended
        sure = self._held[: len(self._held) if is_last else self._sure_length()].rstrip()
        # Not before: white space at the beginning of the answer may be that of a stop string.
        shown = sure if self._has_begun else sure.lstrip()
        if shown:
            self._on_text(shown)
            self._has_begun = True
            self._held = self._held[len(sure) :]

    def _sure_length(self) -> int:
        """Characters before the earliest place at which a stop string may have begun."""
        for start in range(len(self._held)):
            if any(string.startswith(self._held[start:]) for string in self._stop_strings):
                return start
        return len(self._held)
