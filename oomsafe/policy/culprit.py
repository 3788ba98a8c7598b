"""Which kind of work made a process grow, inferred from what it did in each moment and how much it grew then. Pure.

Growth while several pieces of work are in flight can't be divided among them: with equal shares, slow requests are blamed too. Over a
process's life there is more evidence: in a second with more calls of the leaking route, the process grows more. A regression of the growth
on the routes' counts finds that route, under any server. The counts are there anyway.

A wrong name costs its reader an afternoon, so a route is only named if every part of the data points to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

#: The most moments that are kept. When there are more, neighbours are merged in pairs: any sum of moments obeys the same law.
MOMENTS = 64

#: The least seconds of a moment.
SHORTEST = 0.01

#: With fewer moments, calls of the route, or bytes of growth, no route is named.
FEWEST_MOMENTS, FEWEST_CALLS, LEAST_GROWTH = 5, 8, 4 << 20

#: How many routes are told apart; the others count as one.
MOST_ROUTES = 12

#: The share of the whole growth that a route must explain to be named.
EXPLAINS = 0.6

#: The data is fitted again without each of this many parts; a route is named if its figure is SURE times the standard error of these fits.
PARTS, SURE = 8, 5.0

#: A ridge of this share of the diagonal makes two routes that are always called together share what they explain.
RIDGE = 0.001

#: The number of fits; each gives less weight to moments that were far off in the previous one, such as one with a balloon.
REWEIGHED = 3

#: Stands for all routes beyond the most frequent.
REST = ""


class Moment(NamedTuple):
    """What happened in a span of time."""

    seconds: float
    growth: int
    """Bytes; negative if the process shrank."""
    calls: Mapping[str, int]
    """How many pieces of work ended, by route."""


class Culprit(NamedTuple):
    """The route that made the process grow."""

    route: str
    each: int
    """The approximate bytes that each call keeps."""
    calls: int
    share: float
    """Its share of the whole growth, 0 to 1."""


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
        """Start a moment at `at`, with `held` bytes and the total of `calls` by route so far."""
        self._at, self._held, self._calls = at, held, dict(calls)

    def add(self, at: float, held: int, calls: Mapping[str, int], apart: int = 0) -> None:
        """Add a measurement, `at` in seconds on any monotonic clock. `apart` bytes of the growth since the last are explained already."""
        if self._held is None:
            self.begin(at, held, calls)
        self._apart += apart
        if at - self._at < max(self._shortest, SHORTEST):
            return
        # a name that was dropped and has returned counts from its return
        done = {route: new for route, number in calls.items() if (new := number - self._calls.get(route, 0)) > 0}
        self._moments.append(Moment(at - self._at, held - (self._held or 0) - self._apart, done))
        self._apart = 0
        self.begin(at, held, calls)
        if len(self._moments) > MOMENTS:
            self._moments = [_joined(*self._moments[n : n + 2]) for n in range(0, len(self._moments), 2)]
            self._shortest = min(moment.seconds for moment in self._moments) / 2

    @property
    def kept(self) -> Sequence[Moment]:
        """The moments, oldest first."""
        return self._moments

    def culprit(self) -> Culprit | None:
        """See culprit_of()."""
        return culprit_of(self._moments)


def culprit_of(moments: Sequence[Moment]) -> Culprit | None:
    """The route that made the process grow; None if that is not certain."""
    calls: dict[str, int] = {}
    for moment in moments:
        for route, number in moment.calls.items():
            calls[route] = calls.get(route, 0) + number
    growth = sum(moment.growth for moment in moments)
    if len(calls) == 1 and growth >= LEAST_GROWTH:
        # no other route was called
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
    # the jackknife estimate of the standard error
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
    """The number of calls of each route, and last the seconds of the moment, which stand for growth without any call."""
    known = [float(moment.calls.get(route, 0)) for route in routes]
    if routes[-1] == REST:
        known[-1] = float(sum(moment.calls.values())) - sum(known[:-1])
    return [*known, moment.seconds]


def _fits(rows: Sequence[Sequence[float]], goal: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """What one call of each route keeps, at least 0; and the same fitted without each part of the data.

    Weighted least squares: a moment with more calls counts less, and so does one that is far off (Huber's weights).
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
    """The non-negative solution of the equations: unknowns that would be negative are left out, the lowest first."""
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
