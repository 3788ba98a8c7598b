"""The schedule of a pool: the ledger against a server that forks, kills and forgets as gunicorn does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oomsafe.policy.recycle import Order
from oomsafe.policy.replace import LONGEST_BACKOFF, Do, Handover, Ledger, Member, Room, Step, failed, gone, plan, recovered, spawned
from oomsafe.policy.state import State

_, STARTING, SERVING, WAITING, DRAINING, LEAVING = State


def pool(*states: State) -> list[Member]:
    """Workers of generations 1, 2, ... in these states; each has twice as much above its limit as the one before."""
    return [Member(number, state, 1 << number) for number, state in enumerate(states, 1)]


def ordered(order: Order, workers: list[Member], generation: int = 1) -> list[Member]:
    """The same, one of which has an order."""
    return [worker._replace(order=order) if worker.generation == generation else worker for worker in workers]


def ledger(*handovers: tuple[int, int, bool]) -> Ledger:
    """(replacement, victim, ordered) of each."""
    return Ledger(tuple(Handover(*handover) for handover in handovers))


AGED = Member(1, WAITING, -1, aged=True)
NOTHING = Ledger()
SURGING = ledger((3, 1, False))
HANDING = ledger((3, 1, True))
ROOM, FULL = Room(least=1, wanted=2), Room(may_surge=False, least=1, wanted=2)
SHORT = Room(may_surge=False, short=True, least=1, wanted=2)
OUT = SHORT._replace(out=True)
ONE, ONE_FULL, ONE_SHORT = (room._replace(wanted=1) for room in (ROOM, FULL, SHORT))
LATER = Ledger(failures=1, not_before=101)
SPAWN, GO, PERMIT, SHRINK = Do


@pytest.mark.parametrize(
    ("before", "workers", "room", "after", "steps"),
    [
        pytest.param(NOTHING, pool(SERVING, SERVING), ROOM, NOTHING, [], id="nobody asks"),
        pytest.param(NOTHING, pool(WAITING, SERVING), ROOM, NOTHING, [Step(SPAWN, 1)], id="one asks"),
        pytest.param(NOTHING, pool(WAITING, WAITING), ROOM, NOTHING, [Step(SPAWN, 2)], id="the worst of two"),
        pytest.param(NOTHING, pool(WAITING, STARTING), ROOM, NOTHING, [], id="another boots"),
        pytest.param(NOTHING, pool(WAITING, STARTING), ROOM._replace(boots=2), NOTHING, [Step(SPAWN, 1)], id="two may boot"),
        pytest.param(NOTHING, pool(WAITING), ONE, NOTHING, [Step(SPAWN, 1)], id="a pool of one"),
        pytest.param(LATER, pool(WAITING, SERVING), ROOM, LATER, [], id="not so soon after a boot that failed"),
        # its replacement comes first
        pytest.param(SURGING, pool(WAITING, SERVING, STARTING), ROOM, SURGING, [], id="its replacement boots"),
        pytest.param(SURGING, pool(WAITING, SERVING, SERVING), ROOM, HANDING, [Step(GO, 1)], id="and serves"),
        pytest.param(SURGING, pool(SERVING, SERVING, SERVING), ROOM, HANDING, [Step(GO, 1)], id="nobody asks any more"),
        pytest.param(SURGING, pool(WAITING, WAITING, SERVING), ROOM, ledger((3, 2, True)), [Step(GO, 2), Step(SPAWN, 1)], id="or a worse"),
        pytest.param(
            ledger((3, 1, False), (4, 2, False)),
            pool(WAITING, WAITING, SERVING, STARTING),
            ROOM,
            ledger((4, 1, False), (3, 2, True)),
            [Step(GO, 2)],
            id="two swap theirs",
        ),
        pytest.param(SURGING, pool(DRAINING, SERVING, STARTING), ROOM, HANDING, [], id="it did not wait"),
        pytest.param(SURGING, pool(WAITING, SERVING, STARTING), SHORT, SURGING, [Step(PERMIT, 1)], id="short of memory meanwhile"),
        # and does not wait for those who drain
        pytest.param(HANDING, pool(DRAINING, WAITING, SERVING), ROOM, HANDING, [Step(SPAWN, 2)], id="one drains, the next asks"),
        pytest.param(
            ledger((3, 1, True), (4, 2, True)), pool(DRAINING, DRAINING, WAITING, SERVING), ROOM,
            ledger((3, 1, True), (4, 2, True)), [], id="but never twice as many as wanted",
        ),
        # no room for one more
        pytest.param(NOTHING, pool(WAITING, WAITING), FULL, NOTHING, [Step(PERMIT, 2)], id="no room, so drain first"),
        pytest.param(NOTHING, [Member(1, WAITING, -1), Member(2, SERVING)], FULL, NOTHING, [], id="it is not over its limit yet"),
        pytest.param(NOTHING, ordered(Order.PERMIT, pool(WAITING, WAITING)), FULL, NOTHING, [], id="another may go already"),
        pytest.param(NOTHING, pool(WAITING, LEAVING), FULL, NOTHING, [], id="another leaves"),
        pytest.param(NOTHING, pool(WAITING, STARTING), FULL, NOTHING, [], id="another starts"),
        pytest.param(NOTHING, pool(WAITING), ONE_FULL, NOTHING, [], id="the only one stays while the budget holds it"),
        pytest.param(NOTHING, pool(WAITING), ONE_FULL._replace(least=0), NOTHING, [Step(PERMIT, 1)], id="unless its user wants it so"),
        pytest.param(LATER, pool(WAITING, SERVING), FULL, LATER, [], id="nor drain first after a boot that failed"),
        # over a hard limit
        pytest.param(NOTHING, [Member(1, WAITING, 9, urgent=True), Member(2, SERVING)], ROOM, NOTHING, [Step(PERMIT, 1)], id="hard"),
        pytest.param(NOTHING, [Member(1, WAITING, 9, urgent=True)], ONE, NOTHING, [Step(SPAWN, 1)], id="hard, and the only one"),
        pytest.param(NOTHING, [Member(1, WAITING, 1, urgent=True), Member(2, WAITING, 9)], ROOM, NOTHING, [Step(PERMIT, 1)], id="hard 1st"),
        # short of memory
        pytest.param(NOTHING, pool(WAITING, WAITING), SHORT, NOTHING, [Step(PERMIT, 2)], id="short: the worst goes"),
        pytest.param(NOTHING, pool(WAITING, DRAINING), SHORT, NOTHING, [], id="short: the others keep still"),
        pytest.param(NOTHING, pool(WAITING, STARTING), SHORT, NOTHING, [], id="short: the last stays until another serves"),
        pytest.param(NOTHING, pool(WAITING, STARTING, SERVING), SHORT, NOTHING, [Step(PERMIT, 1)], id="short: it is not the last"),
        pytest.param(NOTHING, pool(WAITING), ONE_SHORT, NOTHING, [Step(PERMIT, 1)], id="short: a pool of one"),
        pytest.param(NOTHING, pool(WAITING, DRAINING), OUT, NOTHING, [Step(PERMIT, 1)], id="about to be killed: whoever else is away"),
        pytest.param(NOTHING, ordered(Order.PERMIT, pool(WAITING, WAITING)), OUT, NOTHING, [], id="one after the other"),
        pytest.param(LATER, pool(WAITING, SERVING), SHORT, LATER, [Step(PERMIT, 1)], id="short, and boots fail"),
        pytest.param(LATER, pool(WAITING), ONE_SHORT._replace(out=True), LATER, [], id="short, boots fail, and it is the last"),
        # for its age
        pytest.param(NOTHING, [AGED, Member(2, SERVING)], ROOM, NOTHING, [Step(SPAWN, 1)], id="old: its replacement first"),
        pytest.param(NOTHING, [AGED], ONE, NOTHING, [Step(SPAWN, 1)], id="old, and a pool of one"),
        pytest.param(NOTHING, [AGED, Member(2, WAITING, 5)], ROOM, NOTHING, [Step(SPAWN, 2)], id="old: behind who is over its limit"),
        pytest.param(NOTHING, [Member(2, WAITING, -1, aged=True), AGED], ROOM, NOTHING, [Step(SPAWN, 1)], id="old: the oldest first"),
        pytest.param(SURGING, [AGED, *pool(SERVING, SERVING, SERVING)[1:]], ROOM, HANDING, [Step(GO, 1)], id="old: its replacement serves"),
        pytest.param(NOTHING, [AGED, Member(2, SERVING)], FULL, NOTHING, [Step(PERMIT, 1)], id="old: no room, so drain first"),
        pytest.param(NOTHING, [AGED, Member(2, STARTING)], FULL, NOTHING, [], id="old: no room, and another starts"),
        pytest.param(NOTHING, [AGED], ONE_FULL, NOTHING, [], id="old, no room, and the only one"),
        pytest.param(NOTHING, [AGED, Member(2, SERVING)], SHORT, NOTHING, [Step(PERMIT, 1)], id="old, and memory is short"),
        pytest.param(NOTHING, [AGED, Member(2, WAITING, 5)], SHORT, NOTHING, [Step(PERMIT, 2)], id="old, and another is over its limit"),
        pytest.param(NOTHING, [AGED], ONE_SHORT, NOTHING, [], id="old, memory is short, and the only one"),
        pytest.param(NOTHING, [AGED, Member(2, DRAINING)], OUT, NOTHING, [], id="old is no reason to be the next to go"),
        pytest.param(NOTHING, [AGED._replace(excess=3), Member(2, DRAINING)], OUT, NOTHING, [Step(PERMIT, 1)], id="old, over its limit"),
        pytest.param(LATER, [AGED, Member(2, SERVING)], SHORT, LATER, [], id="old, and boots fail"),
        # drained first, and there is room now
        pytest.param(NOTHING, pool(DRAINING, SERVING), ROOM, NOTHING, [Step(SPAWN, 1)], id="one drains"),
        pytest.param(NOTHING, pool(DRAINING, WAITING), ROOM, NOTHING, [Step(SPAWN, 1)], id="before one who asks"),
        pytest.param(NOTHING, pool(DRAINING, SERVING), FULL, NOTHING, [], id="one drains and no room"),
        pytest.param(NOTHING, pool(DRAINING, SERVING, SERVING), ROOM, NOTHING, [], id="one drains and nobody is missing"),
        pytest.param(NOTHING, pool(DRAINING, SERVING, STARTING), ROOM, NOTHING, [], id="the server has replaced it"),
        pytest.param(NOTHING, pool(LEAVING, SERVING), ROOM, NOTHING, [], id="one is gone in a moment"),
        # whose end nobody has told
        pytest.param(SURGING, pool(WAITING, SERVING, SERVING)[1:], ROOM, NOTHING, [Step(SHRINK)], id="it is gone already"),
        pytest.param(SURGING, pool(WAITING, SERVING), ROOM, NOTHING, [Step(SHRINK), Step(SPAWN, 1)], id="its replacement is gone"),
        pytest.param(HANDING, pool(LEAVING, WAITING, SERVING)[1:], ROOM, NOTHING, [Step(SHRINK), Step(SPAWN, 2)], id="the next at once"),
    ],
)  # fmt: skip
def test_each_step(before: Ledger, workers: list[Member], room: Room, after: Ledger, steps: list[Step]) -> None:
    """One row a situation."""
    assert plan(before, workers, room, 100.0) == (after, steps)


def test_an_unknown_figure_is_no_figure() -> None:
    """A worker whose excess can't be told is not worse than one that is over its limit, nor is it over it."""
    unknown = Member(1, WAITING, None)

    _, surging = plan(NOTHING, [unknown, Member(2, WAITING, 5)], ROOM, 100.0)
    _, full = plan(NOTHING, [unknown, Member(2, SERVING)], FULL, 100.0)

    assert (surging, full) == ([Step(SPAWN, 2)], [])


def test_the_oldest_of_those_that_are_about_as_bad() -> None:
    """One that is always a little better than its newest neighbour must not wait for ever."""
    _, steps = plan(NOTHING, [Member(7, WAITING, 1000), Member(9, WAITING, 1020)], ROOM, 100.0)

    assert steps == [Step(SPAWN, 7)]


def test_backing_off() -> None:
    """Each failure doubles the pause, up to a minute; a worker that comes to serve later ends it."""
    backing, pauses = Ledger(), []
    for generation in range(1, 10):
        backing = failed(backing, generation, 100.0)
        pauses.append(backing.not_before - 100.0)

    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_BACKOFF, LONGEST_BACKOFF, LONGEST_BACKOFF]
    assert recovered(backing, [Member(9, SERVING), Member(10, STARTING)]) == backing
    assert recovered(backing, [Member(10, SERVING)]).failures == 0


@pytest.mark.parametrize(
    ("before", "generation", "after", "shrinks"),
    [
        pytest.param(SURGING, 1, NOTHING, 1, id="who asked: its replacement takes its place"),
        pytest.param(SURGING, 3, NOTHING, 1, id="the replacement"),
        pytest.param(SURGING, 2, SURGING, 0, id="another"),
        pytest.param(HANDING, 1, NOTHING, 1, id="the victim"),
        pytest.param(HANDING, 3, HANDING, 0, id="a replacement whose victim still drains: the server brings up another"),
    ],
)
def test_gone(before: Ledger, generation: int, after: Ledger, shrinks: int) -> None:
    """As soon as one is gone, the pool is as many as it should be; one that never served is not tried again at once."""
    served, boots = gone(before, generation, True, 100.0), gone(before, generation, False, 100.0)

    assert served == (after, [Step(SHRINK)] * shrinks)
    assert boots == (failed(after, generation, 100.0), [Step(SHRINK)] * shrinks)


@dataclass
class Worker:
    """One process of the server."""

    state: State = STARTING
    excess: int = 0
    order: Order = Order.NONE
    aged: bool = False


@dataclass
class Server:
    """As many processes as gunicorn would have: it forks for the missing and ends the oldest of those too many."""

    number: int
    workers: dict[int, Worker] = field(default_factory=dict)
    generation: int = 0
    ended: int = 0
    """How many it has ended that were not ending anyway, because there were too many."""

    def fork(self) -> int:
        self.generation += 1
        self.workers[self.generation] = Worker()
        return self.generation

    def manage(self) -> None:
        while len(self.workers) < self.number:
            self.fork()
        for generation in sorted(self.workers)[: len(self.workers) - self.number]:
            self.ended += self.workers[generation].state in (STARTING, SERVING, WAITING)
            self.workers[generation].state = DRAINING


class Surges(RuleBasedStateMachine):
    """Any order of what may happen to a pool; the supervisor looks now and then, and hears at once who is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted, self.turns, self.now, self.room = 3, 1, 0.0, Room()
        self.server, self.ledger, self.too_many = Server(self.wanted), Ledger(), False
        self.server.manage()

    def serving(self) -> int:
        return sum(worker.state in (SERVING, WAITING) and worker.order is Order.NONE for worker in self.server.workers.values())

    def some(self, *states: State) -> list[int]:
        return [generation for generation, worker in self.server.workers.items() if worker.state in states]

    @rule()
    def look(self) -> None:
        self.now += 1
        workers = [Member(generation, w.state, w.excess, w.order, aged=w.aged) for generation, w in self.server.workers.items()]
        self.ledger = recovered(self.ledger, workers)
        self.least = max(1, self.wanted - self.turns)
        self.ledger, steps = plan(self.ledger, workers, self.room._replace(least=self.least, wanted=self.wanted), self.now)
        for step in steps:
            self.do(step)
        self.manage()

    def manage(self) -> None:
        """gunicorn looks after its number: nobody who serves is ended because there is one too many, unless its user wants fewer."""
        before = self.server.ended
        self.server.manage()
        assert self.too_many or self.server.ended == before
        self.too_many = len(self.server.workers) > self.server.number

    def do(self, step: Step) -> None:
        if step.do is SPAWN:
            assert len(self.some(STARTING)) < 1 + self.turns
            self.server.number += 1
            self.ledger = spawned(self.ledger, self.server.fork(), step.generation)
        elif step.do is SHRINK:
            self.server.number -= 1
        else:
            worker = self.server.workers[step.generation]
            worker.order = Order.GO if step.do is GO else Order.PERMIT
            if not self.room.short or (worker.aged and worker.excess <= 0):
                assert self.serving() >= self.least
            elif not self.room.out and self.some(STARTING):
                assert self.serving() > 0
            assert sum(w.order is Order.PERMIT and w.state is WAITING for w in self.server.workers.values()) <= 1

    @precondition(lambda self: self.some(STARTING))
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.server.workers[data.draw(st.sampled_from(self.some(STARTING)))].state = SERVING

    @precondition(lambda self: self.some(SERVING))
    @rule(data=st.data(), excess=st.integers(-3, 9))
    def asks(self, data: st.DataObject, excess: int) -> None:
        worker = self.server.workers[data.draw(st.sampled_from(self.some(SERVING)))]
        worker.state, worker.excess = WAITING, excess

    @precondition(lambda self: self.some(SERVING, WAITING))
    @rule(data=st.data())
    def ages(self, data: st.DataObject) -> None:
        """From now on it asks until it goes."""
        worker = self.server.workers[data.draw(st.sampled_from(self.some(SERVING, WAITING)))]
        worker.state, worker.aged = WAITING, True

    @precondition(lambda self: self.some(WAITING))
    @rule(data=st.data())
    def asks_no_longer(self, data: st.DataObject) -> None:
        """It has got memory back."""
        worker = self.server.workers[data.draw(st.sampled_from(self.some(WAITING)))]
        worker.state, worker.excess = WAITING if worker.aged else SERVING, min(worker.excess, 0)

    def on_their_way(self) -> list[int]:
        return [g for g, w in self.server.workers.items() if w.state in (SERVING, WAITING) and w.order is not Order.NONE]

    @precondition(lambda self: self.on_their_way())
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        self.server.workers[data.draw(st.sampled_from(self.on_their_way()))].state = DRAINING

    @precondition(lambda self: self.some(DRAINING))
    @rule(data=st.data())
    def has_no_work_any_more(self, data: st.DataObject) -> None:
        self.server.workers[data.draw(st.sampled_from(self.some(DRAINING)))].state = LEAVING

    @precondition(lambda self: self.some(DRAINING, LEAVING))
    @rule(data=st.data())
    def ended(self, data: st.DataObject) -> None:
        self.reaped(data.draw(st.sampled_from(self.some(DRAINING, LEAVING))))

    @precondition(lambda self: self.server.workers)
    @rule(data=st.data())
    def died(self, data: st.DataObject) -> None:
        self.reaped(data.draw(st.sampled_from(sorted(self.server.workers))))

    def reaped(self, generation: int) -> None:
        """At any moment, also between the supervisor's look and the server's: it forks for the missing right away."""
        served = self.server.workers.pop(generation).state is not STARTING
        self.ledger, steps = gone(self.ledger, generation, served, self.now)
        self.server.number -= len(steps)
        self.manage()

    @rule(may_surge=st.booleans(), short=st.booleans(), out=st.booleans())
    def memory(self, may_surge: bool, short: bool, out: bool) -> None:
        self.room = Room(may_surge and not short, short, short and out)

    @rule()
    def ttin(self) -> None:
        self.wanted, self.server.number = self.wanted + 1, self.server.number + 1

    @precondition(lambda self: self.wanted > 1)
    @rule()
    def ttou(self) -> None:
        self.wanted, self.server.number, self.too_many = self.wanted - 1, self.server.number - 1, True

    @rule()
    def hup(self) -> None:
        self.ledger, self.server.number, self.too_many = replace(Ledger(), failures=self.ledger.failures), self.wanted, True
        for _ in range(self.wanted):
            self.server.fork()
        self.manage()

    @invariant()
    def each_handover_is_one_more(self) -> None:
        assert self.server.number == self.wanted + self.ledger.extra

    def teardown(self) -> None:
        """When everything has calmed down, there are as many as wanted, and all serve."""
        self.room = Room()
        for _ in range(3 * len(self.server.workers) + 200):
            self.now += LONGEST_BACKOFF
            self.look()
            for generation in self.on_their_way():
                self.server.workers[generation].state = DRAINING
            for generation in self.some(DRAINING, LEAVING):
                self.reaped(generation)
            for generation in self.some(STARTING):
                self.server.workers[generation].state = SERVING
        assert [worker.state for worker in self.server.workers.values()] == [SERVING] * self.wanted


TestSurges = Surges.TestCase
TestSurges.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
