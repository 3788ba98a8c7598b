"""Which kind of work made a process grow, told from what it did in each moment and how much it grew then. Pure.

What grows while several pieces of work are in flight can't be divided among them: equal shares reward whoever waits. Over a process's
life there is more to go by: in a second with more calls of the route that leaks, the process grows by more. A regression of the growth
on the routes' counts finds it, whatever server runs it, and costs a request nothing.

A wrong name costs its reader an afternoon, so a route is named only where every part of the data names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

#: So many moments are kept; then two neighbours become one, for ever longer ones: any sum of moments obeys the same law.
MOMENTS = 64

#: Seconds of a moment, at least.
SHORTEST = 0.01

#: Moments, calls of a route and bytes of growth below which nobody is named.
FEWEST_MOMENTS, FEWEST_CALLS, LEAST_GROWTH = 5, 8, 4 << 20

#: Routes that are told apart; the others are one.
MOST_ROUTES = 12

#: Share of the whole growth that a route must explain to be named.
EXPLAINS = 0.6

#: The data is fitted anew without each of so many parts of it; a route is named when its figure is this many times what that changes it by.
PARTS, SURE = 8, 5.0

#: Two routes that are always called together share what they explain, by a ridge of this share of the diagonal.
RIDGE = 0.001

#: The fit is made so often, each time with less weight for what was far off in the one before: one balloon in a moment.
REWEIGHED = 3

#: All routes beyond the most frequent.
REST = ""


class Moment(NamedTuple):
    """What happened in a span of time."""

    seconds: float
    growth: int
    """Bytes, negative where it shrank."""
    calls: Mapping[str, int]
    """Pieces of work that ended, by route."""


class Culprit(NamedTuple):
    """Who made the process grow."""

    route: str
    each: int
    """Bytes that a call keeps, about."""
    calls: int
    share: float
    """Of the whole growth, 0 to 1."""


class Moments:
    """The last moments of one process, in bounded memory."""

    def __init__(self) -> None:
        self._moments: list[Moment] = []
        self._at = 0.0
        self._held: int | None = None
        self._calls: dict[str, int] = {}
        self._shortest = 0.0
        self._apart = 0

    def begin(self, at: float, held: int, calls: Mapping[str, int]) -> None:
        """From now on: `held` bytes, and `calls` by route until now."""
        self._at, self._held, self._calls = at, held, dict(calls)

    def add(self, at: float, held: int, calls: Mapping[str, int], apart: int = 0) -> None:
        """A measurement; `apart` bytes of what it grew by are accounted for already. Seconds on any monotonic clock."""
        if self._held is None:
            self.begin(at, held, calls)
        if at - self._at < max(self._shortest, 1e-6):
            return
        # a name that was dropped and has come again counts from its return
        done = {route: new for route, number in calls.items() if (new := number - self._calls.get(route, 0)) > 0}
        self._moments.append(Moment(at - self._at, held - (self._held or 0) - apart, done))
        self.begin(at, held, calls)
        if len(self._moments) > MOMENTS:
            self._moments = [_joined(*self._moments[n : n + 2]) for n in range(0, len(self._moments), 2)]
            self._shortest = min(moment.seconds for moment in self._moments) / 2

    @property
    def kept(self) -> Sequence[Moment]:
        """What is known, the oldest first."""
        return self._moments

    def culprit(self) -> Culprit | None:
        """See culprit_of()."""
        return culprit_of(self._moments)


def culprit_of(moments: Sequence[Moment]) -> Culprit | None:
    """The route that made the process grow; None where that can't be told."""
    calls: dict[str, int] = {}
    for moment in moments:
        for route, number in moment.calls.items():
            calls[route] = calls.get(route, 0) + number
    growth = sum(moment.growth for moment in moments)
    if len(calls) == 1 and growth >= LEAST_GROWTH:
        # nobody else did anything
        ((route, number),) = calls.items()
        return Culprit(route, growth // number, number, 1.0) if number >= FEWEST_CALLS else None
    routes = sorted(calls, key=lambda route: -calls[route])[:MOST_ROUTES]
    if len(moments) < FEWEST_MOMENTS or growth < LEAST_GROWTH or not routes:
        return None
    if len(calls) > len(routes):
        routes.append(REST)
    rows = [_row(moment, routes) for moment in moments]
    each, parts = _fits(rows, [moment.growth / 1024 for moment in moments])
    often = [sum(row[n] for row in rows) for n in range(len(routes) + 1)]
    explains = [value * number for value, number in zip(each, often, strict=True)]
    best = max(range(len(routes)), key=explains.__getitem__)
    route = routes[best]
    if route == REST or calls[route] < FEWEST_CALLS or explains[best] < EXPLAINS * max(growth / 1024, sum(explains)):
        return None
    found = [part[best] for part in parts]
    mean = sum(found) / len(found)
    # the jackknife's: how far the figure would be off by chance
    error = ((len(found) - 1) / len(found) * sum((one - mean) ** 2 for one in found)) ** 0.5
    if each[best] < SURE * error:
        return None
    return Culprit(route, int(each[best] * 1024), calls[route], min(1.0, explains[best] * 1024 / growth))


def _joined(first: Moment, second: Moment | None = None) -> Moment:
    if second is None:
        return first
    calls = {route: first.calls.get(route, 0) + second.calls.get(route, 0) for route in {**first.calls, **second.calls}}
    return Moment(first.seconds + second.seconds, first.growth + second.growth, calls)


def _row(moment: Moment, routes: Sequence[str]) -> list[float]:
    """How often each route was called, and last how long it took: what grows by itself."""
    known = [float(moment.calls.get(route, 0)) for route in routes]
    if routes[-1] == REST:
        known[-1] = float(sum(moment.calls.values())) - sum(known[:-1])
    return [*known, moment.seconds]


def _fits(rows: Sequence[Sequence[float]], goal: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """What one call of each keeps, at least 0; and the same without each part of the data.

    Least squares, in which a moment with more in it counts for less, and so does one that is far off (Huber's weights).
    """
    scale = [1.0 / (1.0 + sum(row[:-1])) for row in rows]
    weights, each = list(scale), [0.0] * len(rows[0])
    for _ in range(REWEIGHED):
        each = _solved(_products(rows, goal, weights))
        off = [abs(y - sum(a * b for a, b in zip(row, each, strict=True))) * s**0.5 for row, y, s in zip(rows, goal, scale, strict=True)]
        usual = 2 * sorted(off)[len(off) // 2] or 1.0
        weights = [s * min(1.0, usual / o) if o else s for s, o in zip(scale, off, strict=True)]
    parts, number = [], min(PARTS, len(rows))
    for part in range(number):
        cut = slice(len(rows) * part // number, len(rows) * (part + 1) // number)
        parts.append(_products(rows[cut], goal[cut], weights[cut]))
    whole = [[sum(numbers) for numbers in zip(*lines, strict=True)] for lines in zip(*parts, strict=True)]
    without = [[[a - b for a, b in zip(*lines, strict=True)] for lines in zip(whole, part, strict=True)] for part in parts]
    return _solved(whole), [_solved(rest) for rest in without]


def _products(rows: Sequence[Sequence[float]], goal: Sequence[float], weights: Sequence[float]) -> list[list[float]]:
    """The normal equations: a line for each unknown, its last number the right-hand side."""
    width = len(rows[0])
    products = [[0.0] * (width + 1) for _ in range(width)]
    for row, y, weight in zip(rows, goal, weights, strict=True):
        there = [(n, value) for n, value in enumerate(row) if value]
        for n, value in there:
            line, weighted = products[n], weight * value
            for m, other in there:
                line[m] += weighted * other
            line[-1] += weighted * y
    return products


def _solved(products: Sequence[Sequence[float]]) -> list[float]:
    """What solves the equations, none below 0: whatever would be is left out, the lowest first."""
    there = [n for n, line in enumerate(products) if line[n] > 0]
    each = [0.0] * len(products)
    while there:
        found = _eliminated([[products[n][m] * (1 + RIDGE * (n == m)) for m in there] + [products[n][-1]] for n in there])
        lowest = min(range(len(there)), key=found.__getitem__)
        if found[lowest] >= 0:
            for n, value in zip(there, found, strict=True):
                each[n] = value
            break
        del there[lowest]
    return each


def _eliminated(lines: list[list[float]]) -> list[float]:
    """Gauss's elimination; the ridge keeps the diagonal above 0."""
    size = len(lines)
    for n in range(size):
        pivot = lines[n]
        for line in lines[n + 1 :]:
            if factor := line[n] / pivot[n]:
                for m in range(n, size + 1):
                    line[m] -= factor * pivot[m]
    found = [0.0] * size
    for n in reversed(range(size)):
        found[n] = (lines[n][-1] - sum(map(mul, lines[n][n + 1 : -1], found[n + 1 :]))) / lines[n][n]
    return found
