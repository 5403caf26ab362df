"""Curves as figures for a page: points in, places in a drawing out. Knows no markup; the template draws the lines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from knowledge_engine.cli.curves import Point, extent, short, thin, ticks

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 548, 22, 198
"""The field of the curves within the drawing."""

MAX_POINTS = 400  # of one curve: more than a page has room for, few enough to hover over


class Series(NamedTuple):
    name: str
    points: Sequence[Point]
    has_dots: bool = False
    """Whether the points themselves are shown: for values that are measured now and then."""


class Mark(NamedTuple):
    """Something that happened at some x."""

    x: float
    label: str
    text: str


class Tick(NamedTuple):
    at: float
    label: str


class Line(NamedTuple):
    name: str
    path: str
    dots: list[tuple[float, float]]


class Stop(NamedTuple):
    """Where a reader points at: all that was measured at one x. `left` and `width` are the strip that belongs to it."""

    left: float
    width: float
    at: float
    places: list[tuple[int, float]]
    """Of each value, which line it is on, and its height."""
    text: str


class Figure(NamedTuple):
    title: str
    unit: str
    x_name: str
    summary: str
    """The curves in words, for who cannot see them."""
    across: list[Tick]
    up: list[Tick]
    lines: list[Line]
    marks: list[Mark]
    notches: list[Mark]
    stops: list[Stop]


def figure(
    title: str,
    unit: str,
    series: Iterable[Series],
    *,
    x_name: str = "step",
    marks: Sequence[Mark] = (),
    notches: Sequence[Mark] = (),
    from_zero: bool = False,
    words: Callable[[float], str] = short,
) -> Figure | None:
    """The figure of some curves over one axis; None when there is nothing finite to draw.

    `marks` are lines across the field, `notches` signs on its lower edge; both only where the axis reaches.
    """
    drawn = [Series(name, thin(points, MAX_POINTS), has_dots) for name, points, has_dots in series]
    drawn = [some for some in drawn if any(math.isfinite(point.y) for point in some.points)]
    points = [point for some in drawn for point in some.points if math.isfinite(point.y)]
    span, rise = extent(point.x for point in points), extent(point.y for point in points)
    if span is None or rise is None:
        return None
    if from_zero:
        rise = min(0.0, rise[0]), max(0.0, rise[1])
    scale = _Scale(span, rise)
    return Figure(
        title=title,
        unit=unit,
        x_name=x_name,
        summary="; ".join(_told(some, x_name, words) for some in drawn),
        across=[Tick(scale.across(at), f"{at:,.0f}") for at in ticks(*span, 6) if at == int(at)],
        up=[Tick(scale.up(at), words(at)) for at in ticks(*rise, 4)],
        lines=[_line(some, scale) for some in drawn],
        marks=[mark._replace(x=scale.across(mark.x)) for mark in marks if span[0] <= mark.x <= span[1]],
        notches=[notch._replace(x=scale.across(notch.x)) for notch in notches if span[0] <= notch.x <= span[1]],
        stops=_stops(drawn, scale, x_name, words),
    )


class _Scale:
    def __init__(self, span: tuple[float, float], rise: tuple[float, float]) -> None:
        self._span, self._rise = span, rise

    def across(self, x: float) -> float:
        low, high = self._span
        return round(LEFT + (x - low) / (high - low) * (RIGHT - LEFT), 1)

    def up(self, y: float) -> float:
        low, high = self._rise
        return round(BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP), 1)


def _line(series: Series, scale: _Scale) -> Line:
    """A path that is lifted where a run ends, where x goes back, and where there is no number."""
    path: list[str] = []
    before: Point | None = None
    for point in series.points:
        if not math.isfinite(point.y):
            before = None
            continue
        joined = before is not None and before.run == point.run and before.x <= point.x
        # A point alone is a line of no length, which round ends make visible.
        path.append(f"{'L' if joined else 'M'}{scale.across(point.x)} {scale.up(point.y)}{'' if joined else 'h0'}")
        before = point
    finite = [point for point in series.points if math.isfinite(point.y)]
    dots = [(scale.across(point.x), scale.up(point.y)) for point in finite] if series.has_dots else []
    return Line(series.name, "".join(path), dots)


def _stops(drawn: Sequence[Series], scale: _Scale, x_name: str, words: Callable[[float], str]) -> list[Stop]:
    found: defaultdict[float, list[tuple[int, Point]]] = defaultdict(list)
    for number, some in enumerate(drawn):
        for point in some.points:
            if math.isfinite(point.y):
                found[point.x].append((number, point))
    several = len({point.run for values in found.values() for _, point in values}) > 1
    stops = []
    places = [(scale.across(x), x) for x in sorted(found)]
    for index, (at, x) in enumerate(places):
        left = (places[index - 1][0] + at) / 2 if index else LEFT
        right = (places[index + 1][0] + at) / 2 if index + 1 < len(places) else RIGHT
        said = [
            f"{drawn[number].name} {words(point.y)}{f' (attempt {point.run})' if several else ''}"
            for number, point in found[x]
        ]
        heights = [(number, scale.up(point.y)) for number, point in found[x]]
        text = f"{x_name} {x:,.0f}: {', '.join(said)}"
        stops.append(Stop(round(left, 1), round(max(0.5, right - left), 1), at, heights, text))
    return stops


def _told(series: Series, x_name: str, words: Callable[[float], str]) -> str:
    finite = [point for point in series.points if math.isfinite(point.y)]
    first, last = finite[0], finite[-1]
    low, high = min(finite, key=lambda point: point.y), max(finite, key=lambda point: point.y)
    return (
        f"{series.name} from {words(first.y)} at {x_name} {first.x:,.0f} to {words(last.y)} at {x_name} {last.x:,.0f}, "
        f"lowest {words(low.y)} at {low.x:,.0f}, highest {words(high.y)} at {high.x:,.0f}"
    )
