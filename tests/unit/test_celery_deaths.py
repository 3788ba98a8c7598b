"""What MainProcess makes of its children's ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("celery")

from unit.scripted import CGROUP

from oomsafe.celery.pool import GuardedPool
from oomsafe.celery.pool_guard import HandedOut, PoolGuard
from oomsafe.celery.redelivery import Redelivery
from oomsafe.kernel.oom_kills import Kills
from oomsafe.policy.ends import End
from oomsafe.policy.limits import Capacity
from oomsafe.policy.settings import Policy
from oomsafe.policy.verdicts import Verdict
from oomsafe.supervisor.deaths import Death, Deaths, OomCounter


class Billiard:
    """As much of its pool as tells of a child's birth and end."""

    _processes = 1

    def __init__(self) -> None:
        self._cache: dict[int, Any] = {}
        self._pool: list[Any] = []
        self.lost: list[Any] = []

    def _create_worker_process(self, pid: int) -> Any:
        return child(pid, None)

    def process_flush_queues(self, worker: Any) -> None:
        """It has nothing to flush."""

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        self.lost.append(job)

    def mark_as_worker_lost(self, job: Any, exitcode: int) -> None:
        """With its own error."""
        job._set(None, (False, "WorkerLostError"))


class Pool(GuardedPool, Billiard):
    """One without seats: a child's slot tells nothing."""


@pytest.fixture
def pool() -> Any:
    capacity = Capacity(None, CGROUP)
    deaths = Deaths(None, lambda: capacity, victims=lambda _: None)
    supervisor: Any = SimpleNamespace(board=None, backstop=None, policy=Policy(), capacity=capacity, deaths=deaths)
    limits: Any = None
    guard = PoolGuard(supervisor, limits, Redelivery(lambda: None, 2, "", False))  # type: ignore[arg-type, return-value]
    made = Pool(oomsafe=guard)
    counted = [0]
    guard.deaths.counter = OomCounter(lambda: Kills(counted[0], own=True))
    made.guard, made.counted = guard, counted  # type: ignore[attr-defined]
    return made


def child(pid: int, exitcode: int | None) -> Any:
    return SimpleNamespace(pid=pid, exitcode=exitcode)


def died(pool: Any, pid: int) -> Any:
    """A child that was started and has died."""
    pool._create_worker_process(pid)
    return child(pid, -9)


def test_a_death_that_is_told_twice_counts_once(pool: Any) -> None:
    """Celery's on_process_down tells of a child that billiard has told of; the second must not use up another's kill."""
    pool.counted[0] = 2
    first, second = died(pool, 11), died(pool, 12)
    for worker in (first, first):
        pool.process_flush_queues(worker)
    pool.guard.reaped()
    pool.process_flush_queues(second)
    pool.guard.reaped()

    assert [(death.pid, death.verdict) for death in pool.guard.deaths.last] == [(12, Verdict.CONFIRMED), (11, Verdict.CONFIRMED)]
    assert pool.guard.deaths.counts == {End.OOM_CONFIRMED: 2}


def inside(pool: Any, monkeypatch: pytest.MonkeyPatch, ticket: int) -> None:
    """A child's slot says that it died inside of this job."""
    monkeypatch.setattr(pool.guard.deaths, "read", lambda *seat_and_end: Death(**seat_and_end[-1]._asdict(), ticket=ticket))


@pytest.mark.parametrize(("accepted", "told"), [(False, [(None, 11)]), (True, [])])
def test_a_task_that_had_begun_is_not_handed_out_again(pool: Any, monkeypatch: pytest.MonkeyPatch, accepted: bool, told: list[Any]) -> None:
    """Its child was killed inside of it before MainProcess had read that it had taken it up: it is this child's all the same."""
    acks: list[Any] = []
    job = SimpleNamespace(_job=4, _accepted=accepted, _ack=lambda part, _, pid, fd: acks.append((part, pid)))
    pool._cache[4] = job
    inside(pool, monkeypatch, 4)

    pool.process_flush_queues(died(pool, 11))

    assert acks == told


def test_the_number_of_a_job_is_its_ticket(pool: Any) -> None:
    """So none has 0, which is none on the scoreboard."""
    import billiard.pool

    assert next(billiard.pool.job_counter) > 0


@pytest.mark.parametrize(("kills", "result"), [(1, "WorkerOutOfMemory"), (0, "WorkerLostError")])
def test_the_task_that_a_child_died_inside_of(pool: Any, monkeypatch: pytest.MonkeyPatch, kills: int, result: str) -> None:
    """Has its result at once, with its name; another's task of that child billiard waits for, as ever."""
    results: list[Any] = []
    job = SimpleNamespace(_job=4, _worker_pid=11, _accepted=True, _set=lambda _, result: results.append(result[1]))
    job.oomsafe = HandedOut(None, "proj.task", "an-id")
    pool._cache[4] = job
    inside(pool, monkeypatch, 4)
    pool.counted[0] = kills
    other = SimpleNamespace(_job=5)

    pool.process_flush_queues(died(pool, 11))
    pool.on_job_process_lost(other, 11, -9)
    pool.on_job_process_lost(job, 11, -9)
    pool.guard.reaped()

    assert pool.lost == [other]
    (found,) = results
    assert (found if kills == 0 else found.type.__name__) == result
    assert pool.guard.deaths.counts == {End.OOM_CONFIRMED if kills else End.SIGNAL: 1}
    if kills:
        assert pool.guard.deaths.last[0].work == ("proj.task", "an-id")


def test_a_child_whose_queues_are_flushed_while_it_lives_keeps_its_seat(pool: Any) -> None:
    pool._create_worker_process(11)

    pool.process_flush_queues(child(11, None))

    assert list(pool.guard._children) == [11]
    assert pool.guard.deaths.of(11) is None
