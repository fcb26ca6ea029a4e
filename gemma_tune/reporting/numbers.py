"""How sizes and times are written for a person."""

from __future__ import annotations


def format_seconds(seconds: float) -> str:
    """`1:02:03`, `2:03` or `4 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def format_bytes(num_bytes: int) -> str:
    """In 10^9 or 10^6 bytes."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
