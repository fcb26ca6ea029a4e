"""Words, sizes and times as a person reads them."""

import datetime
import difflib
import shlex
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the nearest choice, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the end of a message, or an empty string when no choice is near."""
    near = did_you_mean(name, choices)
    return f"; {near}" if near else ""


def counted(count: int, noun: str) -> str:
    """Return `1 row`, `1,250 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(names: Sequence[str], *, shown: int = 3, count: int | None = None) -> str:
    """Return the first names on one line and how many more there are: `a, b, c and 2 more`; `count` is of all."""
    more = (len(names) if count is None else count) - len(names[:shown])
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more else "")


def shorten(text: str, *, num_chars: int) -> str:
    """Return a text of at most so many characters, the last of which then is `…`."""
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"


# Control characters except line break and tab, each shown as a sign of its own.
_CONTROL_SIGNS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {
    code: 0xFFFD for code in range(127, 160)
}


def in_shell(value: object) -> str:
    """Return a path or another text as one word of a shell's command line."""
    return shlex.quote(str(value))


def without_controls(text: str) -> str:
    """Return a text that cannot move a terminal's cursor, rename its window or colour what follows."""
    return text.translate(_CONTROL_SIGNS)


def format_seconds(seconds: float) -> str:
    """Return `1:02:03`, `2:03` or `4 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def format_bytes(num_bytes: float, *, digits: int = 1) -> str:
    """Return `1.5 GB` (10^9 bytes) with so many digits, or `250 MB` (10^6 bytes) with one less."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.{digits}f} GB"
    return f"{num_bytes / 1e6:,.{digits - 1}f} MB"


def utc_now() -> str:
    """Return the time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
