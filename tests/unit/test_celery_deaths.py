"""What MainProcess makes of its children's ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("celery")

from unit.scripted import CGROUP

from oomsafe.celery.pool import Seating
from oomsafe.celery.redelivery import Redelivery
from oomsafe.kernel.oom_kills import Kills
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.policy.verdicts import Verdict
from oomsafe.supervisor.deaths import Death, OomCounter


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
    supervisor: Any = SimpleNamespace(board=None, policy=Policy(), capacity=Capacity(None, CGROUP))
    limits: Any = None
    made = Pool(oomsafe=supervisor, limits=limits, redelivery=Redelivery(lambda: None, 2, "", False))
    counted = [0]
    made.deaths.counter = OomCounter(lambda: Kills(counted[0], own=True))
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
    pool.deaths.settle()
    pool.process_flush_queues(second)
    pool.deaths.settle()

    assert [(death.pid, death.verdict) for death in pool.deaths.last] == [(12, Verdict.CONFIRMED), (11, Verdict.CONFIRMED)]
    assert pool.deaths.counts == {"confirmed": 2}


@pytest.mark.parametrize(("accepted", "told"), [(False, [(None, 11)]), (True, [])])
def test_a_task_that_had_begun_is_not_handed_out_again(pool: Any, monkeypatch: pytest.MonkeyPatch, accepted: bool, told: list[Any]) -> None:
    """Its child was killed inside of it before MainProcess had read that it had taken it up: it is this child's all the same."""
    acks: list[Any] = []
    job = SimpleNamespace(_job=4, _accepted=accepted, _ack=lambda part, _, pid, fd: acks.append((part, pid)))
    pool._cache[4] = job
    monkeypatch.setattr(pool.deaths, "read", lambda *_, **__: Death(pid=11, exitcode=-9, ticket=5))

    pool.gone(child(11, -9), None)

    assert acks == told


def test_a_child_whose_queues_are_flushed_while_it_lives_keeps_its_seat(pool: Any) -> None:
    pool._seats[11] = seat = object()
    pool.process_flush_queues(child(11, None))

    assert pool._seats == {11: seat}
    assert pool.deaths.of(11) is None
