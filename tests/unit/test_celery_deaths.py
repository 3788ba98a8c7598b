"""What MainProcess makes of its children's ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("celery")

from oomsafe.celery.pool import Seating
from oomsafe.celery.redelivery import Redelivery
from oomsafe.kernel.oom_kills import Kills
from oomsafe.policy.settings import Policy
from oomsafe.policy.verdicts import Verdict
from oomsafe.supervisor.deaths import FRESH, Deaths


class Billiard:
    """As much of its pool as tells of an end."""

    def __init__(self) -> None:
        self._cache: dict[int, Any] = {}
        self._pool: list[Any] = []

    def process_flush_queues(self, worker: Any) -> None:
        """It has nothing to flush."""


class Pool(Seating, Billiard):
    """One without seats: a child's slot tells nothing."""


@pytest.fixture
def pool() -> Any:
    supervisor: Any = SimpleNamespace(board=None, policy=Policy())
    limits: Any = None
    made = Pool(oomsafe=supervisor, limits=limits, redelivery=Redelivery(lambda: None, 2, "", False))
    counted = [0]
    made._deaths = Deaths(lambda: Kills(counted[0], own=True))
    made.counted = counted  # type: ignore[attr-defined]
    return made


def child(pid: int, exitcode: int | None) -> Any:
    return SimpleNamespace(pid=pid, exitcode=exitcode)


def test_a_death_that_is_told_twice_counts_once(pool: Any) -> None:
    """Celery's on_process_down tells of a child that billiard has told of; the second must not use up another's kill."""
    pool.counted[0] = 2
    first, second = child(11, -9), child(12, -9)
    for worker in (first, first):
        pool.process_flush_queues(worker)
    pool._settle()
    pool.process_flush_queues(second)
    pool._settle()

    assert [(gone.pid, gone.verdict) for gone in pool._gone.values()] == [(11, Verdict.CONFIRMED), (12, Verdict.CONFIRMED)]
    assert pool.fallen.counts == {"confirmed": 2}


@pytest.mark.parametrize(("accepted", "told"), [(False, [(None, 11)]), (True, [])])
def test_a_task_that_had_begun_is_not_handed_out_again(pool: Any, monkeypatch: pytest.MonkeyPatch, accepted: bool, told: list[Any]) -> None:
    """Its child was killed inside of it before MainProcess had read that it had taken it up: it is this child's all the same."""
    acks: list[Any] = []
    job = SimpleNamespace(_job=4, _accepted=accepted, _ack=lambda part, _, pid, fd: acks.append((part, pid)))
    pool._cache[4] = job
    monkeypatch.setattr(pool, "_left_behind", lambda _: (5, None))

    worker = child(11, -9)
    pool.gone(worker, SimpleNamespace())

    assert acks == told


def test_what_no_death_explains_was_another_process() -> None:
    """Told once, when it can't be a child's any more: a death may take that long to be told of."""
    counted, clock = [0], [0.0]
    deaths = Deaths(lambda: Kills(counted[0], own=True), lambda: clock[0])
    counted[0] = 3
    deaths.look()
    deaths.settle(1)
    assert (deaths.risen, deaths.others()) == (True, 0)

    clock[0] = FRESH + 1
    deaths.look()

    assert (deaths.risen, deaths.others(), deaths.others()) == (False, 2, 0)


def test_a_child_whose_queues_are_flushed_while_it_lives_keeps_its_seat(pool: Any) -> None:
    pool._seats[11] = seat = object()
    pool.process_flush_queues(child(11, None))

    assert pool._seats == {11: seat}
    assert not pool._gone
