"""Curves: every point where its numbers say, axes whose labels are round, names that are no markup."""

import math
import xml.etree.ElementTree

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pixel_jax.evaluation.curves import FEW, HEIGHT, MOST, WIDTH, curves, panel, thinned, ticks

SVG = xml.etree.ElementTree.fromstring


def points_of(line):
    return np.array([[float(x) for x in spot.split(",")] for spot in line.get("points").split()])


def labels(svg, anchor):
    """(place, number) of the labels of an axis."""
    found = [x for x in svg.iter("text") if x.get("text-anchor") == anchor]
    return [(float(x.get("x")), float(x.get("y")), float(x.text)) for x in found if _is_number(x.text)]


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def test_a_point_lies_where_the_labels_beside_it_say():
    lines = {"a": [(0, 0.1), (10, 0.5), (20, 0.45)], "b": [(0, 0.2), (20, 0.3)]}
    svg = SVG(panel("accuracy", lines, "step"))
    below = np.array([(x, value) for x, _, value in labels(svg, "middle")])
    beside = np.array([(y, value) for _, y, value in labels(svg, "end")])
    assert len(below) > 2 and len(beside) > 2
    to_x, to_y = (np.polynomial.Polynomial.fit(a[:, 0], a[:, 1], 1) for a in (below, beside - [[4, 0]]))
    drawn = {line.get("stroke"): points_of(line) for line in svg.iter("polyline")}
    for name, points in zip(("#c2185b", "#1565c0"), lines.values(), strict=True):
        seen = drawn[name]
        np.testing.assert_allclose(to_x(seen[:, 0]), [x for x, _ in points], atol=0.05)
        np.testing.assert_allclose(to_y(seen[:, 1]), [y for _, y in points], atol=0.002)
    assert len(list(svg.iter("circle"))) == 5
    assert {"a", "b"} <= {x.text for x in svg.iter("text")}


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(allow_nan=True, allow_infinity=True)), max_size=30),
    st.none() | st.just((0.0, 1.0)),
)
def test_whatever_the_numbers_are_the_lines_stay_on_the_plane(points, bounds):
    points = [(x, y) for x, y in sorted(points) if not abs(y) > 1e300]
    svg = SVG(panel("t", {"a": points}, "step", bounds))
    for line in svg.iter("polyline"):
        for x, y in points_of(line) if line.get("points") else ():
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans())
def test_ticks_are_round_and_inside(low, width, whole):
    assume(width > 1e-6 * abs(low))  # else the numbers themselves are not exact enough
    found = ticks(low, low + width, whole=whole)
    assert len(found) <= 8
    assert all(low - 1e-6 * width - 1e-6 * abs(low) <= x <= low + width * (1 + 1e-6) + 1e-6 * abs(low) for x in found)
    if whole:
        assert all(x == round(x) for x in found)
    if len(found) > 2:
        steps = np.diff(found)
        mantissa = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-6)
        assert min(abs(mantissa - x) for x in (1, 2, 5)) < 1e-2


def test_a_long_line_is_thinned_by_means_and_not_marked():
    points = [(i, i % 2) for i in range(10 * MOST)]
    assert len(thinned(points)) == MOST and {y for _, y in thinned(points)} == {0.5}
    assert "circle" not in panel("t", {"a": points[: FEW + 1]}, "step")


@pytest.mark.parametrize("name", ["<b>", '"><script>', "&amp;"])
def test_names_are_text(name):
    drawn = curves({name: {name: [(0, 1.0)], "other": [(1, 2.0)]}}, name)
    seen = SVG(drawn)
    assert {x.tag for x in seen.iter()} == {"div", "svg", "text", "line", "polyline", "circle"}
    assert sum(x.text == name for x in seen.iter("text")) == 3 and "http" not in drawn
