"""Numbers as curves: which points stand for thousands, where ticks go, and a plot in braille characters.

Pure functions over points; nothing here knows a job, a terminal or a page. A `y` that is no finite number is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

DOTS_ACROSS, DOTS_DOWN = 2, 4
"""Dots in one braille character."""

_BLANK = 0x2800
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column; Unicode, Braille Patterns
_STEPS = (1, 2, 2.5, 5, 10)  # what people count in


class Point(NamedTuple):
    """Points of different runs are not joined."""

    x: float
    y: float
    run: int = 1


class Plot(NamedTuple):
    """`rows` are lines of braille, the top one first; `owners` says of each character which series it shows, -1 for
    none. `low` and `high` are the y of the lowest and the highest dot."""

    rows: list[str]
    owners: list[list[int]]
    low: float
    high: float


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """About `limit` of the points: the lowest and the highest of every stretch, and both ends. No spike is lost.

    Points are taken in their order, whatever their x.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for first in range(0, len(points), size):
        stretch = range(first, min(first + size, len(points)))
        finite = [at for at in stretch if math.isfinite(points[at].y)]
        if not finite:
            kept.add(first)  # the gap
            continue
        kept |= {min(finite, key=lambda at: points[at].y), max(finite, key=lambda at: points[at].y)}
    return [points[at] for at in sorted(kept)]


def extent(values: Iterable[float]) -> tuple[float, float] | None:
    """The lowest and the highest finite value, a little apart even where they are one; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if low == high:
        margin = abs(low) / 10 or 1
        return low - margin, high + margin
    return low, high


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many; `low` must be less."""
    raw = (high - low) / max(1, about)
    power = 10 ** math.floor(math.log10(raw))
    step = min((step * power for step in _STEPS), key=lambda step: abs(math.log(step / raw)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in a few characters: `0.912`, `161`, `12,400`, `2e-4`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def plot(series: Sequence[Sequence[Point]], width: int, height: int) -> Plot | None:
    """All series in one field of `width` times `height` characters; None when there is no finite point.

    Every column of dots spans all that happened in it. Where series meet, the later one owns the character.
    """
    points = [point for some in series for point in some if math.isfinite(point.y)]
    span = extent(point.x for point in points)
    rise = extent(point.y for point in points)
    if span is None or rise is None or width < 1 or height < 1:
        return None
    field = _Field(width, height, span, rise)
    for owner, some in enumerate(series):
        field.draw(thin(some, 4 * DOTS_ACROSS * width), owner)
    return Plot(field.rows(), field.owners, *rise)


class _Field:
    """Dots, counted from the lower left."""

    def __init__(self, width: int, height: int, span: tuple[float, float], rise: tuple[float, float]) -> None:
        self._bits = [[0] * width for _ in range(height)]
        self.owners = [[-1] * width for _ in range(height)]
        self._across, self._down = DOTS_ACROSS * width - 1, DOTS_DOWN * height - 1
        self._span, self._rise = span, rise

    def rows(self) -> list[str]:
        return ["".join(chr(_BLANK + bits) if bits else " " for bits in row) for row in self._bits]

    def draw(self, points: Sequence[Point], owner: int) -> None:
        for point in points:
            if math.isfinite(point.y):
                column, dot = self._place(point)
                self._fill(column, dot, dot, owner)
        for before, point in pairwise(points):
            joined = before.run == point.run and before.x <= point.x
            if joined and math.isfinite(before.y) and math.isfinite(point.y):
                for column, low, high in _line(self._place(before), self._place(point)):
                    self._fill(column, low, high, owner)

    def _place(self, point: Point) -> tuple[int, int]:
        (left, right), (low, high) = self._span, self._rise
        # Divided first: the difference of two large numbers may be beyond a float, that of their shares is not.
        across = (point.x / 2 - left / 2) / (right / 2 - left / 2)
        up = (point.y / 2 - low / 2) / (high / 2 - low / 2)
        return round(across * self._across), round(up * self._down)

    def _fill(self, column: int, low: int, high: int, owner: int) -> None:
        """Sets the dots of a column from `low` to `high`."""
        for dot in range(low, high + 1):
            row = self._down - dot
            character = row // DOTS_DOWN, column // DOTS_ACROSS
            self._bits[character[0]][character[1]] |= _BITS[row % DOTS_DOWN][column % DOTS_ACROSS]
            self.owners[character[0]][character[1]] = owner


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """The dots of a straight line as (column, lowest, highest), without a hole between two columns."""
    (left, first), (right, last) = start, end
    if left == right:
        yield left, min(first, last), max(first, last)
        return
    at = first
    for column in range(left, right + 1):
        there = first + round((last - first) * (column - left) / (right - left))
        nearer = at + (there > at) - (there < at)  # the dot of the column before is drawn already
        yield column, min(nearer, there), max(nearer, there)
        at = there
