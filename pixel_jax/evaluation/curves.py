"""Draws line charts as inline SVG, readable at half a page's width, in print and on dark screens."""

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

COLORS = ("#c2185b", "#1565c0", "#2e7d32", "#ef6c00", "#6a1b9a")
WIDTH, HEIGHT = 460, 250  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 40  # margins around the plane of a panel
TICKS = 5  # ticks along an axis, about
FEW = 40  # points of a line that are marked one by one
MOST = 600  # points of a line that are drawn; of more, means of neighbours


def ticks(low: float, high: float, count: int = TICKS, *, whole: bool = False) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten.

    With `whole` they are integers.
    """
    step = _step((high - low) / count) if high > low else 1.0
    step = max(step, 1.0) if whole else step
    slack = 1e-9 * (high - low) / step  # a tick at an end may miss it by rounding
    first = math.ceil(low / step - slack)
    return [(first + i) * step for i in range(int(math.floor(high / step + slack)) - first + 1)]


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((power * x for x in (1, 2, 5) if power * x >= rough * 0.999), power * 10)


def label(value: float) -> str:
    """Writes a number beside an axis."""
    return f"{value:.0f}" if abs(value) >= 10 and value == round(value) else f"{value:.4g}"


def thinned(points: Points) -> Points:
    """Reduces points to at most `MOST`, which are means of equally many neighbours."""
    size = max(1, -(-len(points) // MOST))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def panel(title: str, lines: Mapping[str, Points], x_label: str, bounds: tuple[float, float] | None = None) -> str:
    """Draws one chart as an `<svg>` element; points that are not finite are left out.

    Args:
        title: the title of the chart.
        lines: label -> points (x, y), by rising x.
        x_label: the label of the x axis.
        bounds: the bounds of the y axis; None: those of the points.
    """
    lines = {name: thinned([p for p in points if all(map(math.isfinite, p))]) for name, points in lines.items()}
    every = [point for points in lines.values() for point in points]
    xs, ys = [x for x, _ in every] or [0.0], [y for _, y in every] or [0.0]
    x_low, x_high = min(0.0, *xs), max(1.0, *xs)
    y_low, y_high = bounds or (min(ys), max(ys))
    if y_high - y_low < 1e-12 * max(abs(y_high), 1e-12):  # a level line lies in the middle
        margin = max(abs(y_low), abs(y_high)) / 2
        margin = margin if margin > 1e-300 else 0.5  # half of a subnormal number may be 0
        y_low, y_high = y_low - margin, y_high + margin

    def place_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>'

    parts = [text(LEFT, 16, title, 'class="title"')]
    for y in ticks(y_low, y_high):
        at = place_y(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(text(LEFT - 6, at + 4, label(y), 'text-anchor="end"'))
    for x in ticks(x_low, x_high, whole=True):
        parts.append(text(place_x(x), HEIGHT - BOTTOM + 16, label(x), 'text-anchor="middle"'))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, 'text-anchor="middle"'))
    right = WIDTH - RIGHT
    for i, (name, points) in reversed(list(enumerate(lines.items()))):
        color = COLORS[i % len(COLORS)]
        path = " ".join(f"{place_x(x):.1f},{place_y(min(max(y, y_low), y_high)):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(points) <= FEW:
            for spot in path.split():
                x, y = spot.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="2.6" fill="{color}"/>')
        if len(lines) > 1:
            parts.append(text(right, 30, name, f'text-anchor="end" fill="{color}" class="name"'))
            right -= 7 * len(name) + 18
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def curves(
    panels: Mapping[str, Mapping[str, Points]], x_label: str, bounds: Mapping[str, tuple[float, float]] | None = None
) -> str:
    """Draws charts next to each other, in as many columns as the page holds; `bounds` has those of y by title."""
    bounds = bounds or {}
    drawn = [panel(title, lines, x_label, bounds.get(title)) for title, lines in panels.items()]
    return f'<div class="curves">{"".join(drawn)}</div>'
