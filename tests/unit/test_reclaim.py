"""When a worker tries to give memory back, and how much of its heap it walks: tables and laws, and the heap of this very process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.kernel import heap
from oomsafe.policy.reclaim import (
    DOUBLES,
    FULL,
    IDLE_FOR,
    LEAST,
    LEAST_WHEN_IDLE,
    RECLAIM_EVERY,
    SHARED_MUCH,
    WALKED_AT_MOST,
    YOUNG,
    due,
    due_when_idle,
    futile_after,
    futile_when_idle,
    generation,
    pays,
    would_pay,
)
from oomsafe.worker import reclaim

MIB = 1 << 20


def wait(futile: int) -> float:
    """Seconds from the last attempt until the next is due."""
    return next(seconds for seconds in (RECLAIM_EVERY * 2**n for n in range(20)) if due(1000.0, futile, 1000.0 + seconds))


def test_the_first_is_due_at_once() -> None:
    """Nothing has been tried."""
    assert due(None, 0, 0.0)


@pytest.mark.parametrize(
    ("freed", "expected"),
    [(0, [20, 40, 80, 160, 320, 640, 640]), (19 * MIB, [20, 40, 80, 160, 320, 640, 640]), (20 * MIB, [10] * 7), (99 * MIB, [10] * 7)],
)
def test_a_futile_attempt_doubles_the_wait(freed: int, expected: list[int]) -> None:
    """40 MiB over the limit: less than half of that is futile."""
    futile, waits = 0, []
    for _ in range(7):
        futile = futile_after(futile, 40 * MIB, freed)
        waits.append(wait(futile))

    assert expected == waits


def test_one_that_helps_ends_the_row() -> None:
    """Then it is tried as often as at first."""
    assert futile_after(5, 40 * MIB, 30 * MIB) == 0


def test_a_few_kilobytes_are_no_help() -> None:
    """However little the worker was over its limit by: a walk of the heap costs more."""
    assert (futile_after(0, 4096, LEAST - 1), futile_after(0, 4096, LEAST)) == (1, 0)


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)), max_size=30))
def test_the_wait_is_bounded(attempts: list[tuple[int, int]]) -> None:
    """Law: never more often than every RECLAIM_EVERY, never less often than every 640 s."""
    futile = 0
    for over, freed in attempts:
        futile = futile_after(futile, over, freed)

    assert RECLAIM_EVERY <= wait(futile) <= RECLAIM_EVERY * 2**DOUBLES


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1)), max_size=30), st.integers(0, 1 << 40), st.floats(0, 1e4))
def test_an_idle_worker_tries_no_more_often_than_every_so_often(tries: list[tuple[int, float]], grown: int, idle: float) -> None:
    """Law: not before it is idle and has grown; then at most every RECLAIM_EVERY; less often while that is futile, or takes long."""
    futile = 0
    for freed, took in tries:
        before, futile = futile, futile_when_idle(futile, freed, took)
        assert futile == 0 or futile > before or futile == DOUBLES

    assert not due_when_idle(idle, grown, 1000.0, futile, 1000.0 + RECLAIM_EVERY * 2 ** min(futile, DOUBLES) - 0.01)
    assert due_when_idle(idle, grown, None, futile, 1000.0) is (idle >= IDLE_FOR and grown >= LEAST_WHEN_IDLE)


@given(st.lists(st.integers(0, 1 << 40), max_size=16), st.integers(0, 1 << 40))
def test_more_given_back_never_pays_less(trimmed: list[int], more: int) -> None:
    """Law; and what has not been tried does not pay."""
    assert would_pay(trimmed) <= would_pay([freed + more for freed in trimmed])
    assert pays(len(trimmed), sum(trimmed)) <= pays(len(trimmed), sum(trimmed) + more)
    assert not would_pay([]) and not pays(0, 0)


@pytest.mark.parametrize(
    ("blocks", "others_wait", "shared", "expected"),
    [
        (10 * WALKED_AT_MOST, False, 0, FULL),
        (WALKED_AT_MOST, True, 0, FULL),
        (WALKED_AT_MOST + 1, True, 0, YOUNG),
        (1, False, SHARED_MUCH - 1, FULL),
        (1, False, SHARED_MUCH, YOUNG),
        (1, True, SHARED_MUCH, YOUNG),
    ],
)
def test_generation(blocks: int, others_wait: bool, shared: int, expected: int) -> None:
    """All of the heap, unless others wait for long or it is shared."""
    assert expected == generation(blocks, others_wait, shared)


class Cycle:
    """Garbage that only gc can free."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def old_garbage() -> Iterator[weakref.ref[Cycle]]:
    """A cycle that has lived through two collections, and is garbage now; no automatic collection takes it."""
    cycle = Cycle()
    reference = weakref.ref(cycle)
    gc.collect(0)
    gc.collect(1)
    gc.disable()
    del cycle
    yield reference
    gc.enable()


@pytest.mark.parametrize(
    ("others_wait", "blocks", "shared", "frozen", "freed"),
    [
        (False, 10 * WALKED_AT_MOST, 0, None, True),
        (True, 10 * WALKED_AT_MOST, 0, None, False),
        (True, 10 * WALKED_AT_MOST, 0, 10 * WALKED_AT_MOST - 1, True),
        (False, 1, SHARED_MUCH, None, False),
        (False, 1, SHARED_MUCH, 1, True),
        (False, 1, None, None, True),
    ],
    ids=["alone", "others-wait", "others-wait-and-most-is-frozen", "shared", "shared-and-frozen", "not-known"],
)
def test_what_is_collected(
    monkeypatch: pytest.MonkeyPatch, old_garbage: weakref.ref[Cycle], others_wait: bool, blocks: int, shared: int | None,
    frozen: int | None, freed: bool,
) -> None:  # fmt: skip
    """The real collector: old garbage is walked to, or left alone."""
    monkeypatch.setattr(reclaim.sys, "getallocatedblocks", lambda: blocks)
    monkeypatch.setattr(reclaim, "shared_with_parent", lambda: shared)
    monkeypatch.setattr(heap, "_frozen_blocks", frozen)

    reclaim.collect(others_wait)

    assert freed is (old_garbage() is None)
