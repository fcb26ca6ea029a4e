"""Charts, read back as XML."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gemma_tune.reporting.charts import Line, place_curves, points_of, smoothed, thinned
from gemma_tune.reporting.pages import TEMPLATES_DIR
from gemma_tune.runs.evaluation import Estimate
from gemma_tune.text import counted


def draw(macro: str, *values: object) -> str:
    """The chart of a macro, as the pages draw it."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES_DIR), autoescape=True, undefined=StrictUndefined)
    environment.filters.update({"counted": counted, "thousands": lambda number: f"{number:,}"})
    return str(getattr(environment.get_template("charts.html.j2").module, macro)(*values))


def line_chart(lines: list[Line], *, title: str, x_label: str) -> str:
    placed = place_curves(lines, title=title, x_label=x_label)
    assert placed is not None
    return draw("line_chart", placed)


def bar_chart(bins: list[dict[str, int]], *, limit: int) -> str:
    return draw("bar_chart", bins, limit)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def polyline(root: ElementTree.Element) -> list[tuple[float, float]]:
    (line,) = root.iter("polyline")
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_points_lie_on_the_scale_of_the_labels() -> None:
    root = parse(line_chart([Line([(0, 0.0), (50, 1.5), (100, 3.0)], 0)], title="loss", x_label="step"))
    labels = {text.text: text.attrib for text in root.iter("text")}
    placed = polyline(root)
    # Text hangs 4 below the line that it labels; x labels stand in the middle of their value.
    assert placed[0][1] == pytest.approx(float(labels["0"]["y"]) - 4, abs=200)
    y_of = {text.text: float(text.attrib["y"]) - 4 for text in root.iter("text") if text.attrib["class"] == "end"}
    assert placed[2][1] == pytest.approx(y_of["3"], abs=0.2)
    assert placed[0][1] == pytest.approx(y_of["0"], abs=0.2)
    assert placed[1][1] == pytest.approx((y_of["0"] + y_of["3"]) / 2, abs=0.2)
    assert placed[2][0] == pytest.approx(float(labels["100"]["x"]), abs=0.2)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1e-9, 3e-9], [5.0, 5.0], [-2.0, 7.0], [1e9, 3e9], [0.3, 0.1, 0.2], [7.0]]
)
def test_every_curve_stays_inside(values: list[float]) -> None:
    svg = line_chart([Line([(at + 1, value) for at, value in enumerate(values)], 0)], title="t", x_label="step")
    root = parse(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    points = (
        polyline(root)
        if len(values) > 1
        else [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    )
    assert len(points) == len(values)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert "nan" not in svg and 3 <= sum(text.attrib["class"] == "end" for text in root.iter("text")) <= 9


def test_two_single_points_are_not_joined() -> None:
    two = parse(line_chart([Line([(0, 2.0), (9, 1.0)], 1, "points")], title="t", x_label="step"))
    assert len(list(two.iter("circle"))) == 2 and not list(two.iter("polyline"))
    three = parse(line_chart([Line([(0, 2.0), (5, 1.5), (9, 1.0)], 1, "points")], title="t", x_label="step"))
    assert len(list(three.iter("circle"))) == 3 and len(list(three.iter("polyline"))) == 1


def test_nothing_is_no_chart() -> None:
    assert place_curves([Line([], 0)], title="t", x_label="step") is None


def test_labels_are_escaped() -> None:
    svg = line_chart([Line([(0, 1.0), (1, 2.0)], 0)], title="<b>\"'&", x_label="</svg><script>")
    root = parse(svg)
    assert root.attrib["aria-label"] == "<b>\"'&"
    assert "</svg><script>" in [text.text for text in root.iter("text")]


def test_a_long_curve_is_thinned_to_means() -> None:
    points = [(float(at), float(at % 2)) for at in range(10_000)]
    few = thinned(points, max_points=100)
    assert len(few) == 100
    assert all(y == pytest.approx(0.5) for _, y in few)
    assert few[0][0] == pytest.approx(49.5)
    assert thinned(points[:100], max_points=100) == points[:100]


def test_smoothing_is_adams() -> None:
    """A weighted mean of what came before, without a pull to 0 at its start."""
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 1.0}]
    points = points_of(rows, "loss")
    assert points == [(1, 3.0), (4, 1.0)]
    assert smoothed(points) == [(1, pytest.approx(3.0)), (4, pytest.approx((0.9 * 3.0 + 1.0) / 1.9))]
    assert [y for _, y in smoothed([(x, 2.0) for x in range(50)])] == pytest.approx([2.0] * 50)


def test_bars_are_as_high_as_their_counts() -> None:
    bins = [
        {"low": 1, "high": 16, "count": 10},
        {"low": 17, "high": 24, "count": 5},
        {"low": 25, "high": 32, "count": 0},
    ]
    bars = list(parse(bar_chart(bins, limit=16)).iter("rect"))
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[0] == 2 * heights[1] and heights[2] == 0
    assert [bar.attrib["class"] for bar in bars] == ["bar", "over", "over"]
    assert bars[0][0].text == "1 to 16 tokens: 10 rows"


def test_shares_and_their_intervals() -> None:
    root = parse(draw("share_bar", [(Estimate(0.5, 0.25, 0.75), 0), (Estimate(1.0, None, None), 1)]))
    width = float(re.split(r" ", root.attrib["viewBox"])[2])
    fills = [float(rect.attrib["width"]) for rect in root.iter("rect") if rect.attrib["class"].startswith("fill")]
    assert fills == [width / 2, width]
    (whisker,) = [rect.attrib for rect in root.iter("rect") if rect.attrib["class"] == "whisker"]
    assert (float(whisker["x"]), float(whisker["width"])) == (width / 4, width / 2)
