"""How many bytes containers hold, against what the allocator says that they took."""

from __future__ import annotations

import functools
import gc
import sys
import tracemalloc
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
from unit.children import in_child

from oomsafe.policy.objects import LRU
from oomsafe.worker.census import Found, some_of_cache, take_census
from oomsafe.worker.sizes import Measures, Sizes

pytestmark = pytest.mark.skipif(sys.implementation.name != "cpython", reason="another Python does not list its objects so")

KIB, MIB = 1 << 10, 1 << 20


class Thing:
    """An object with a few attributes of its own."""

    def __init__(self, number: int) -> None:
        self.number = number + 10**6
        self.text = str(number) * 5
        self.items = [number + 10**7]


class Slotted:
    """One without a dictionary."""

    __slots__ = ("text",)

    def __init__(self, number: int) -> None:
        self.text = str(number) * 50


def _cache(bound: int | None) -> Callable[[int], str]:
    cached = functools.lru_cache(maxsize=bound)(lambda number: str(number) * 1000)
    for number in range(1500):
        cached(number)
    return cached


def _objects_of_a_loop() -> list[Any]:
    found: list[Any] = []
    for number in range(5000):
        here: list[Any] = [str(number) * 20]
        here.append(here)
        found.append(here)
    return found


KINDS: dict[str, Callable[[], Any]] = {
    "few large blobs": lambda: [bytes(100 * KIB) + b"x" for _ in range(150)],
    "lists of dicts": lambda: [[{"a": number + 10**6 + row} for number in range(0, 150_000, 100)] for row in range(150)],
    "objects": lambda: {number: Thing(number) for number in range(20_000)},
    "slots": lambda: [Slotted(number) for number in range(20_000)],
    "text": lambda: {f"key {number}": f"value {number}" for number in range(100_000)},
    "a set of text": lambda: {f"text {number}" for number in range(100_000)},
    "tuples": lambda: [(f"{number}" * 8, number + 10**6) for number in range(50_000)],
    "a deque": lambda: deque(bytearray(100 * KIB) for _ in range(130)),
    "an ordered dictionary": lambda: OrderedDict((number + 10**6, bytes(2000)) for number in range(5000)),
    "objects that refer to themselves": _objects_of_a_loop,
    "a cache with a bound": lambda: _cache(3000),
    "a cache without one": lambda: _cache(None),
}


def _module() -> types.ModuleType:
    """A module of the application's."""
    module = sys.modules["the_app"] = types.ModuleType("the_app")
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    """Within a quarter; what refers to itself counts for less, because a reference from elsewhere is taken for another's."""

    def run() -> tuple[int | None, int]:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        _module().held = KINDS[kind]()
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        census = take_census(30.0)
        (found,) = [one for one in (*census.containers, *census.caches) if one.name == "the_app.held"]
        return found.size, taken

    size, taken = in_child(run)  # what malloc keeps of all that would be in the way of other tests

    assert size is not None and (0.4 if "themselves" in kind else 0.75) <= size / taken <= 1.25, (size, taken)


@pytest.mark.parametrize("entries", range(240, 270))
def test_a_caches_results_are_found_whatever_its_size(entries: int) -> None:
    """It refers to a key, a result and a type in turn: a sample must not always hit the same of these."""
    held = functools.lru_cache(maxsize=1000)(lambda number: str(number) * 1000)
    for number in range(1000, 1000 + entries):
        held(number)

    assert (
        0.75 <= Sizes(Measures()).held(*some_of_cache(Found("", entries, held, LRU, is_cache=True, bound=1000))) / (4049 * entries) <= 1.25
    )


def test_numpys_arrays() -> None:
    """Their data counts, which neither Python nor its garbage collector knows of; that of a view does not."""
    numpy = pytest.importorskip("numpy")

    def run() -> dict[str, int | None]:
        app, whole = _module(), numpy.ones(5 * MIB // 8)
        app.held, app.views = [numpy.ones(100 * KIB // 8) for _ in range(110)], [whole[:1000] for _ in range(110)]
        return {one.name: one.size for one in take_census(30.0).containers if one.name.startswith("the_app")}

    sizes = in_child(run)

    assert 10 * MIB < (sizes["the_app.held"] or 0) < 12 * MIB
    assert (sizes["the_app.views"] or 0) < MIB


def test_what_many_share_is_not_one_containers_own() -> None:
    """Nor is the program: modules, classes, functions."""

    def run() -> tuple[dict[str, int], int]:
        app, texts = _module(), [str(number) * 1000 for number in range(1000)]
        app.first, app.second, app.third, app.fourth = list(texts), list(texts), list(texts), texts
        app.program = [types, pytest, Thing, take_census] * 50
        sizes = {one.name: one.size or 0 for one in take_census(30.0).containers if one.name.startswith("the_app")}
        return sizes, sum(map(sys.getsizeof, texts))

    sizes, whole = in_child(run)

    assert all(0.15 * whole < sizes[f"the_app.{name}"] < 0.35 * whole for name in ("first", "second", "third", "fourth")), (sizes, whole)
    assert sizes["the_app.program"] < 10 * KIB
