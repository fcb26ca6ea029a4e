"""Work out where the curves of a chart lie; `templates/charts.html.j2` draws them as SVG."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Point = tuple[float, float]

NUM_COLOURS = 6
# A curve of more points is drawn through the means of as many pieces: no screen shows more.
MAX_POINTS = 600
WIDE, NARROW = 720, 420
_LEFT, _RIGHT, _TOP, _FOOT = 58, 12, 12, 30


@dataclass(frozen=True)
class Line:
    """One curve."""

    points: Sequence[Point]  # (x, y) with rising x
    colour: int  # number of a colour, 0 to NUM_COLOURS - 1
    # a strong line, a faint one behind it, or single points on a thin line
    kind: Literal["strong", "faint", "points"] = "strong"


@dataclass(frozen=True)
class Chart:
    """Curves over one x axis, placed: what the template draws. Positions are in the units of its view box."""

    title: str
    x_label: str
    width: int
    height: int
    left: int  # left, right: where the grid begins and ends
    right: int
    x_ticks: Sequence[tuple[float, str]]  # position and label
    y_ticks: Sequence[tuple[float, str]]
    curves: Sequence[tuple[Line, Sequence[Point]]]  # each line with where its points are


def place_curves(
    lines: Sequence[Line], *, title: str, x_label: str, width: int = WIDE, height: int = 260
) -> Chart | None:
    """Place curves for `line_chart` of charts.html.j2; None without a point. The y axis begins at 0 or lower.

    Width and height are in the units in which its text is 11 high: a chart on half the page is half as wide.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points), count=5)
    x_ticks = [tick for tick in _ticks(x_low, x_high, count=7 if width == WIDE else 5) if x_low <= tick <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> Point:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (width - _LEFT - _RIGHT), height - _FOOT - up * (height - _FOOT - _TOP)

    return Chart(
        title,
        x_label,
        width,
        height,
        left=_LEFT,
        right=width - _RIGHT,
        x_ticks=[(place(tick, y_low)[0], _tick_label(tick)) for tick in x_ticks],
        y_ticks=[(place(x_low, tick)[1], _tick_label(tick)) for tick in y_ticks],
        curves=[(line, [place(x, y) for x, y in thinned(line.points)]) for line in lines],
    )


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
