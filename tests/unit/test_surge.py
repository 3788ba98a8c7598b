"""Replacement first: the ledger against a server that forks, kills and forgets as gunicorn does."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oomsafe.policy.surge import LONGEST_BACKOFF, Do, Ledger, Room, Seen, Stage, Step, failed, plan, recovered, spawned

STARTING, SERVING, WAITING, DRAINING, LEAVING = Stage


def seen(*stages: Stage) -> list[Seen]:
    """Workers of generations 1, 2, ... at these stages; each has a byte more than the one before."""
    return [Seen(number, stage, number) for number, stage in enumerate(stages, 1)]


SURGING = Ledger(replacement=3, asker=1)
HANDING = Ledger(replacement=3, asker=1, victim=1)
ROOM, FULL = Room(least=1, wanted=2), Room(may_surge=False, least=1, wanted=2)


@pytest.mark.parametrize(
    ("ledger", "workers", "room", "after", "steps"),
    [
        pytest.param(Ledger(), seen(SERVING, SERVING), ROOM, Ledger(), [], id="nobody-waits"),
        pytest.param(Ledger(), seen(WAITING, SERVING), ROOM, Ledger(), [Step(Do.SPAWN, 1)], id="one-waits"),
        pytest.param(Ledger(), seen(WAITING, WAITING), ROOM, Ledger(), [Step(Do.SPAWN, 2)], id="the-worst-of-two"),
        pytest.param(Ledger(), seen(WAITING, WAITING), FULL, Ledger(), [Step(Do.GRANT, 2)], id="no-room-so-drain-first"),
        pytest.param(Ledger(), seen(WAITING, STARTING), ROOM, Ledger(), [], id="another-is-away"),
        pytest.param(Ledger(), seen(WAITING, LEAVING), FULL, Ledger(), [], id="another-leaves"),
        pytest.param(Ledger(), seen(WAITING), ROOM, Ledger(), [], id="another-has-died"),
        pytest.param(Ledger(not_before=101), seen(WAITING, SERVING), ROOM, Ledger(not_before=101), [], id="not-so-soon-again"),
        pytest.param(Ledger(not_before=101), seen(WAITING, SERVING), FULL, Ledger(not_before=101), [], id="nor-drain-first"),
        pytest.param(Ledger(), seen(DRAINING, SERVING), ROOM, Ledger(), [Step(Do.SPAWN, 1)], id="one-drains-by-itself"),
        pytest.param(Ledger(), seen(DRAINING, WAITING), ROOM, Ledger(), [Step(Do.SPAWN, 1)], id="before-one-who-waits"),
        pytest.param(Ledger(), seen(DRAINING, DRAINING), ROOM, Ledger(), [Step(Do.SPAWN, 2)], id="both-drain"),
        pytest.param(Ledger(), seen(DRAINING, SERVING), FULL, Ledger(), [], id="one-drains-and-no-room"),
        pytest.param(Ledger(), seen(DRAINING, SERVING, SERVING), ROOM, Ledger(), [], id="one-drains-and-nobody-is-missing"),
        pytest.param(Ledger(), seen(DRAINING, SERVING, STARTING), ROOM, Ledger(), [], id="the-server-has-replaced-it"),
        pytest.param(Ledger(not_before=101), seen(DRAINING, SERVING), ROOM, Ledger(not_before=101), [], id="one-drains-and-boots-fail"),
        pytest.param(Ledger(), seen(LEAVING, SERVING), ROOM, Ledger(), [], id="one-is-gone-in-a-moment"),
        pytest.param(SURGING, seen(WAITING, SERVING, STARTING), ROOM, SURGING, [], id="its-replacement-boots"),
        pytest.param(SURGING, seen(WAITING, SERVING, SERVING), ROOM, HANDING, [Step(Do.GRANT, 1)], id="and-serves"),
        pytest.param(SURGING, seen(WAITING, WAITING, SERVING), ROOM, Ledger(3, 1, 2), [Step(Do.GRANT, 2)], id="another-is-worse"),
        pytest.param(SURGING, seen(SERVING, SERVING, SERVING), ROOM, HANDING, [Step(Do.GRANT, 1)], id="nobody-waits-any-more"),
        pytest.param(SURGING, seen(LEAVING, SERVING, STARTING), ROOM, HANDING, [], id="it-did-not-wait"),
        pytest.param(SURGING, seen(DRAINING, SERVING, STARTING), ROOM, HANDING, [], id="it-did-not-wait-and-has-work"),
        pytest.param(SURGING, seen(WAITING, SERVING, SERVING)[1:], ROOM, Ledger(), [Step(Do.SHRINK)], id="it-is-gone-already"),
        pytest.param(SURGING, seen(WAITING, SERVING), ROOM, failed(SURGING, 3, 100), [Step(Do.FAILED)], id="the-replacement-died"),
        pytest.param(HANDING, seen(LEAVING, WAITING, SERVING), ROOM, HANDING, [], id="it-drains-and-another-waits"),
        pytest.param(HANDING, seen(LEAVING, SERVING, SERVING)[1:], ROOM, Ledger(), [Step(Do.SHRINK)], id="it-is-gone"),
        pytest.param(
            HANDING, seen(LEAVING, WAITING, SERVING)[1:], ROOM, Ledger(), [Step(Do.SHRINK), Step(Do.SPAWN, 2)], id="and-the-next-at-once"
        ),
        pytest.param(HANDING, seen(DRAINING, DRAINING, SERVING), ROOM, HANDING, [], id="another-drains-too-and-has-to-wait"),
    ],
)
def test_each_step(ledger: Ledger, workers: list[Seen], room: Room, after: Ledger, steps: list[Step]) -> None:
    """One row a situation."""
    assert plan(ledger, workers, room, 100.0) == (after, steps)


def test_backing_off() -> None:
    """Each failure doubles the pause, up to a minute; a worker that comes to serve later ends it."""
    ledger, pauses = Ledger(), []
    for generation in range(1, 10):
        ledger = failed(ledger, generation, 100.0)
        pauses.append(ledger.not_before - 100.0)

    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_BACKOFF, LONGEST_BACKOFF, LONGEST_BACKOFF]
    assert recovered(ledger, [Seen(9, SERVING), Seen(10, STARTING)]) == ledger
    assert recovered(ledger, [Seen(10, SERVING)]).failures == 0


def test_another_workers_death_at_boot_leaves_the_surge() -> None:
    """The replacement is still on its way."""
    assert failed(SURGING, 7, 100.0).replacement == SURGING.replacement


def test_a_replacement_that_dies_when_its_worker_drains_already_leaves_the_surge() -> None:
    """The worker still goes: until then the server itself brings up another."""
    after = failed(HANDING, 3, 100.0)

    assert (after.extra, after.victim, after.failures, after.not_before) == (1, 1, 1, 101.0)


@dataclass
class Worker:
    """One process of the server."""

    stage: Stage = STARTING
    excess: int = 0


@dataclass
class Server:
    """As many processes as gunicorn would have: it forks for the missing and ends the oldest of those too many."""

    number: int
    workers: dict[int, Worker] = field(default_factory=dict)
    generation: int = 0

    def fork(self) -> int:
        self.generation += 1
        self.workers[self.generation] = Worker()
        return self.generation

    def manage(self) -> None:
        while len(self.workers) < self.number:
            self.fork()
        for generation in sorted(self.workers)[: len(self.workers) - self.number]:
            self.workers[generation].stage = DRAINING


class Surges(RuleBasedStateMachine):
    """Any order of what may happen to a pool; the supervisor looks now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted, self.turns, self.now, self.has_room = 3, 1, 0.0, True
        self.server, self.ledger = Server(self.wanted), Ledger()
        self.server.manage()

    def serving(self) -> int:
        return sum(worker.stage in (SERVING, WAITING) for worker in self.server.workers.values())

    def some(self, *stages: Stage) -> list[int]:
        return [generation for generation, worker in self.server.workers.items() if worker.stage in stages]

    @rule()
    def look(self) -> None:
        self.now += 1
        workers = [Seen(generation, worker.stage, worker.excess) for generation, worker in self.server.workers.items()]
        self.ledger = recovered(self.ledger, workers)
        room = Room(self.has_room, self.wanted - self.turns, self.wanted)
        self.ledger, steps = plan(self.ledger, workers, room, self.now)
        for step in steps:
            self.do(step)
        if self.some(DRAINING) and self.has_room and not self.ledger.extra and self.now >= self.ledger.not_before:
            assert len(self.some(STARTING, SERVING, WAITING)) >= self.wanted
        self.server.manage()

    def do(self, step: Step) -> None:
        if step.do is Do.SPAWN:
            assert self.ledger.extra == 0
            self.server.number += 1
            self.ledger = spawned(self.ledger, self.server.fork(), step.generation)
        elif step.do is Do.GRANT:
            self.server.workers[step.generation].stage = DRAINING
            assert self.serving() >= self.wanted - self.turns
        else:
            self.server.number -= 1

    @precondition(lambda self: self.some(STARTING))
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.server.workers[data.draw(st.sampled_from(self.some(STARTING)))].stage = SERVING

    @precondition(lambda self: self.some(SERVING))
    @rule(data=st.data(), excess=st.integers(1, 9))
    def wants(self, data: st.DataObject, excess: int) -> None:
        generation = data.draw(st.sampled_from(self.some(SERVING)))
        self.server.workers[generation] = Worker(WAITING, excess)

    @precondition(lambda self: self.some(WAITING))
    @rule(data=st.data(), goes=st.booleans())
    def waits_no_longer(self, data: st.DataObject, goes: bool) -> None:
        """It has got memory back, or grown so much that it goes by itself."""
        self.server.workers[data.draw(st.sampled_from(self.some(WAITING)))].stage = DRAINING if goes else SERVING

    @precondition(lambda self: self.some(DRAINING))
    @rule(data=st.data())
    def has_no_work_any_more(self, data: st.DataObject) -> None:
        self.server.workers[data.draw(st.sampled_from(self.some(DRAINING)))].stage = LEAVING

    @precondition(lambda self: self.some(DRAINING, LEAVING))
    @rule(data=st.data())
    def gone(self, data: st.DataObject) -> None:
        del self.server.workers[data.draw(st.sampled_from(self.some(DRAINING, LEAVING)))]

    @precondition(lambda self: self.server.workers)
    @rule(data=st.data())
    def died(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.server.workers)))
        at_boot = self.server.workers.pop(generation).stage is STARTING
        if at_boot and (generation != self.ledger.replacement or self.ledger.victim is not None):
            self.ledger = failed(self.ledger, generation, self.now)

    @rule(has_room=st.booleans())
    def memory(self, has_room: bool) -> None:
        self.has_room = has_room

    @rule()
    def ttin(self) -> None:
        self.wanted, self.server.number = self.wanted + 1, self.server.number + 1

    @precondition(lambda self: self.wanted > 1)
    @rule()
    def ttou(self) -> None:
        self.wanted, self.server.number = self.wanted - 1, self.server.number - 1

    @rule()
    def hup(self) -> None:
        self.ledger, self.server.number = Ledger(), self.wanted
        for _ in range(self.wanted):
            self.server.fork()
        self.server.manage()

    @invariant()
    def never_more_than_one_extra(self) -> None:
        assert self.server.number == self.wanted + self.ledger.extra

    def teardown(self) -> None:
        """When everything has calmed down, there are as many as wanted, and all serve."""
        self.has_room = True
        for _ in range(3 * len(self.server.workers) + 200):
            self.now += LONGEST_BACKOFF
            self.look()
            for generation in self.some(DRAINING, LEAVING):
                del self.server.workers[generation]
            for generation in self.some(STARTING):
                self.server.workers[generation].stage = SERVING
        assert [worker.stage for worker in self.server.workers.values()] == [SERVING] * self.wanted


TestSurges = Surges.TestCase
TestSurges.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
