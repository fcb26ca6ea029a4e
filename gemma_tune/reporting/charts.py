"""Draw charts as SVG in a page: numbers become shapes, colours come from the page's style sheet.

Every function gives markup that is safe in a page: all text in it is escaped, and it holds no style and no script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from gemma_tune.text import counted

if TYPE_CHECKING:
    from markupsafe import Markup

Point = tuple[float, float]

NUM_COLOURS = 6
# A curve of more points is drawn through the means of as many pieces: no screen shows more.
MAX_POINTS = 600
WIDE, NARROW = 720, 420
_LEFT, _RIGHT, _TOP, _FOOT = 58, 12, 12, 30
_BARS_HEIGHT, _BARS_HEAD, _BARS_FOOT = 200, 22, 26
# Where there are more bars than fit, only some are labelled; a phone shows every third of those.
_MAX_LABELS = 18


@dataclass(frozen=True)
class Line:
    """One curve."""

    points: Sequence[Point]  # (x, y) with rising x
    colour: int  # number of a colour, 0 to NUM_COLOURS - 1
    # a strong line, a faint one behind it, or single points on a thin line
    kind: Literal["strong", "faint", "points"] = "strong"


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, width: int = WIDE, height: int = 260) -> Markup:
    """Draw curves over one x axis. The y axis begins at 0, unless a value is below it.

    Width and height are in the units in which its text is 11 high: a chart on half the page is half as wide.
    """
    from markupsafe import Markup

    points = [point for line in lines for point in line.points]
    if not points:
        return Markup()
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points), count=5)
    x_ticks = [tick for tick in _ticks(x_low, x_high, count=7 if width == WIDE else 5) if x_low <= tick <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (width - _LEFT - _RIGHT), height - _FOOT - up * (height - _FOOT - _TOP)

    parts = [
        f'<svg class="w{width}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{_tick_label(tick)}</text>')
    for index, tick in enumerate(x_ticks):
        x, _ = place(tick, y_low)
        minor = " minor" if index % 2 else ""
        parts.append(f'<text class="middle{minor}" x="{x:.1f}" y="{height - 8}">{_tick_label(tick)}</text>')
    roomy = " minor" if width == WIDE else ""
    parts.append(f'<text class="end{roomy}" x="{_LEFT - 8}" y="{height - 8}">{escape(x_label)}</text>')
    for line in lines:
        placed = [place(x, y) for x, y in thinned(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        name = f"c{line.colour} {line.kind}"
        # Between two single points a line would claim what happened in between.
        if len(placed) > (2 if line.kind == "points" else 1):
            parts.append(f'<polyline class="{name}" points="{path}"/>')
        if line.kind == "points" or len(placed) == 1:
            parts += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in placed]
    return Markup("".join([*parts, "</svg>"]))


def bar_chart(bins: Sequence[Mapping[str, int]], *, limit: int) -> Markup:
    """Draw rows by length: a bar for each bin of `low` to `high` tokens; those beyond `limit` in another colour."""
    from markupsafe import Markup

    if not bins:
        return Markup()
    highest = max(one["count"] for one in bins) or 1
    step = WIDE / len(bins)
    every = -(-len(bins) // _MAX_LABELS)
    height = _BARS_HEAD + _BARS_HEIGHT + _BARS_FOOT
    foot = _BARS_HEAD + _BARS_HEIGHT
    parts = [f'<svg viewBox="0 0 {WIDE} {height}" role="img" aria-label="rows by length in tokens">']
    for at, one in enumerate(bins):
        tall = _BARS_HEIGHT * one["count"] / highest
        kind = "over" if one["low"] > limit else "bar"
        rows = counted(one["count"], "row")
        parts.append(
            f'<rect class="{kind}" x="{at * step + step * 0.08:.1f}" y="{foot - tall:.1f}" width="{step * 0.84:.1f}" '
            f'height="{tall:.1f}" rx="2"><title>{one["low"]:,} to {one["high"]:,} tokens: {rows}</title></rect>'
        )
        if at % every == 0:
            middle = f"{(at + 0.5) * step:.1f}"
            minor = " minor" if len(bins) > 6 and at // every % 3 else ""
            if one["count"]:
                parts.append(
                    f'<text class="middle{minor}" x="{middle}" y="{foot - tall - 6:.1f}">{one["count"]:,}</text>'
                )
            parts.append(f'<text class="middle{minor}" x="{middle}" y="{height - 6}">≤ {one["high"]:,}</text>')
    parts.append(f'<line x1="0" x2="{WIDE}" y1="{foot}" y2="{foot}"/>')
    return Markup("".join([*parts, "</svg>"]))


def share_bar(estimates: Sequence[tuple[float, float | None, float | None, int]]) -> Markup:
    """Draw shares between 0 and 1, each with its interval as a whisker: (value, low, high, colour)."""
    from markupsafe import Markup

    parts = [
        f'<svg class="shares" viewBox="0 0 300 {len(estimates) * 12}" preserveAspectRatio="none" aria-hidden="true">'
    ]
    for at, (value, low, high, colour) in enumerate(estimates):
        top = at * 12
        parts.append(f'<rect class="track" x="0" y="{top + 2}" width="300" height="8"/>')
        parts.append(f'<rect class="fill{colour}" x="0" y="{top + 2}" width="{value * 300:.1f}" height="8"/>')
        if low is not None and high is not None:
            parts.append(
                f'<rect class="whisker" x="{low * 300:.1f}" y="{top + 5}" width="{max(1.0, (high - low) * 300):.1f}" '
                'height="2"/>'
            )
    return Markup("".join([*parts, "</svg>"]))


def points_of(metrics: Sequence[Mapping[str, Any]], field: str) -> list[Point]:
    """Return a figure by optimizer step, from the lines of metrics.jsonl."""
    return [(row["step"], row[field]) for row in metrics if row.get(field) is not None]


def smoothed(points: Sequence[Point], *, decay: float = 0.9) -> list[Point]:
    """Return the exponential moving mean, corrected for its start as Adam's moments are."""
    smooth, mean = [], 0.0
    for count, (x, y) in enumerate(points, start=1):
        mean = decay * mean + (1 - decay) * y
        smooth.append((x, mean / (1 - decay**count)))
    return smooth


def thinned(points: Sequence[Point], *, max_points: int = MAX_POINTS) -> list[Point]:
    """Return at most `max_points` points: the means of as many equal pieces of the curve."""
    if len(points) <= max_points:
        return list(points)
    edges = [round(index * len(points) / max_points) for index in range(max_points + 1)]
    pieces = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _ticks(low: float, high: float, *, count: int) -> list[float]:
    """Return about `count` round numbers that hold `low` and `high` between them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / (count - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_label(value: float) -> str:
    if value and (abs(value) < 0.01 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
