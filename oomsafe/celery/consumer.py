"""In MainProcess of a node with oomsafe's pool: the node's budget, its intake of tasks, and the suspects that it runs one at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.worker.consumer.tasks import Tasks

from oomsafe.celery.pool import TaskPool
from oomsafe.celery.pool_guard import PoolGuard
from oomsafe.celery.redelivery import Turn
from oomsafe.celery.remote import brief, node_record, pool_record
from oomsafe.log import attempt, failed, log
from oomsafe.policy.limits import resolve_limits
from oomsafe.policy.shedding import RESUME_AT, Child, Intake, shed
from oomsafe.policy.state import State
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.view import PoolView, WorkerView
from oomsafe.supervisor.supervisor import Supervisor

#: Seconds between two measurements of the node.
MEASURE_EVERY = 1.0

#: Seconds between two events for monitors while events are enabled.
SEND_EVERY = 5.0

#: The metrics in which what a child held right after boot is no less than its anonymous memory then. The other metrics leave out what it
#: shares with MainProcess, so a child that has not grown at all would seem to have.
COMPARABLE = frozenset({"anon", "rss"})

#: The reasons for which the gate may be closed.
MEMORY, SUSPECTS = "memory", "suspects"

#: Seconds between two checks of whether the next suspect may start.
RETRY_EVERY = 0.1


class Node(bootsteps.StartStopStep):  # type: ignore[misc]
    """A bootstep of the consumer that measures the node once a second, on Celery's own timer, without a thread."""

    name = "oomsafe.Node"
    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.enabled = isinstance(consumer.pool, TaskPool)
        self._gate = attempt("the gate", "Celery", lambda: Gate(consumer)) if self.enabled else None
        self._intake = Intake()
        self._fresh: dict[int, int] = {}
        self._timer: Any = None
        self._send_at = 0.0
        self.used: int | None = None
        """What the node held when it was last measured, in bytes, as its budget counts it; None: not known."""
        consumer.oomsafe_node = self

    @property
    def paused(self) -> bool:
        """Whether the node starts no new tasks."""
        return self._intake.paused

    def start(self, consumer: Any) -> None:
        """Called at each connection to the broker."""
        self._timer = consumer.timer.call_repeatedly(
            MEASURE_EVERY, lambda: attempt("the check of the node", "Celery", lambda: self._tick(consumer))
        )

    def stop(self, consumer: Any) -> None:
        """Called at the end of each connection."""
        if self._timer is not None:
            consumer.timer.cancel(self._timer)
            self._timer = None
        if self._gate is not None:
            self._gate.forget()

    shutdown = stop

    def _tick(self, consumer: Any) -> None:
        guard: PoolGuard = consumer.pool.guard
        supervisor = guard.supervisor
        if supervisor.board is None:
            return
        supervisor.tick()
        guard.report_other_kills()
        pool = supervisor.board.read()
        limits = resolve_limits(supervisor.policy, supervisor.capacity)[0]
        guard.follow(supervisor.capacity, limits)
        self._keep_to_budget(supervisor, pool)
        events, now = consumer.event_dispatcher, time.monotonic()
        if events and events.enabled and now >= self._send_at:
            self._send_at = now + SEND_EVERY
            events.send("worker-memory", **brief({**pool_record(live(pool)), **node_record(consumer)}))

    def _keep_to_budget(self, supervisor: Supervisor, pool: PoolView) -> None:
        now, workers = time.monotonic(), pool.workers
        _, budget, used = supervisor.reading()
        self.used = used
        before = self._intake
        self._intake, victim = shed(before, used, budget, [self._child(worker, pool.metric) for worker in workers], now)
        known = {worker.generation for worker in workers}
        self._fresh = {generation: held for generation, held in self._fresh.items() if generation in known}
        self._act(supervisor, before, f"{format_size(used)}, its budget is {format_size(budget)}", int((budget or 0) * RESUME_AT))
        for worker in workers:
            if worker.generation == victim:
                log.info(
                    "the node is above its budget: its biggest idle child, %d (anon %s), is recycled",
                    worker.pid,
                    format_size(worker.figures.anon),
                )
                if not supervisor.policy.dry_run:
                    supervisor.tell_to_drain(worker.slot, worker.generation)

    def _act(self, supervisor: Supervisor, before: Intake, figures: str, resumes: int) -> None:
        line = None
        if self._intake.paused and not before.paused:
            line = f"the node starts no new task: it holds {figures}; it goes on below {format_size(resumes)}"
        if self._intake.refused and not before.refused:
            log.warning(
                "the node holds %s, and no child has any of it to give back: it goes on; raise budget, or start fewer children", figures
            )
        elif before.paused and not self._intake.paused:
            log.info("the node starts tasks again: it holds %s", figures)
        if supervisor.policy.dry_run or self._gate is None:
            if line:
                log.warning("%s", line)
        elif self._intake.paused:
            self._gate.close(line)
        elif before.paused:
            self._gate.open()

    def _child(self, worker: WorkerView, metric: str) -> Child:
        held, serves = worker.figures.anon or 0, worker.state is State.SERVING
        if serves and held:
            # a child's first task may have taken its memory before this node has measured the child at all
            at_boot = worker.figures.baseline if metric in COMPARABLE else None
            self._fresh[worker.generation] = min(held, self._fresh.get(worker.generation, held), at_boot or held)
        return Child(worker.generation, held, self._fresh.get(worker.generation, held), serves, not worker.in_flight)


class Gate:
    """Every task passes through here on its way to the pool. Created once, with the consumer.

    While the gate is closed, the node consumes nothing, so that tasks stay in the broker for other nodes. Tasks that
    it had prefetched are held here, unacknowledged: they start when the gate opens, or go back to the
    broker when the connection or the node ends. Without an event loop, one more task may pass: the one
    that is waiting for a child already.
    """

    def __init__(self, consumer: Any) -> None:
        self._reasons: set[str] = set()
        self._consumer = consumer
        self._held: deque[Any] = deque()
        self._says: str | None = None
        self._asked = False
        worker = consumer.controller
        self._start = worker._process_task
        # with an event loop, the worker calls this after it has acquired its semaphore; without one, directly from its consumer
        units = consumer.on_task_request != self._start
        if not units:
            consumer.on_task_request = self._take
        self._suspects = Suspects(consumer, self._start, units, lambda: self.close(reason=SUSPECTS), lambda: self.open(SUSPECTS))
        worker._process_task = self._take

    @property
    def closed(self) -> bool:
        """Whether no tasks are started."""
        return bool(self._reasons)

    def close(self, line: str | None = None, reason: str = MEMORY) -> None:
        """Start no more tasks. From any thread; repeated each time the node is measured. `line` is logged once consuming has stopped."""
        before = reason in self._reasons
        self._reasons.add(reason)
        self._says = line or self._says
        if reason == MEMORY or not before:
            self._turn()

    def open(self, reason: str = MEMORY) -> None:
        """Resume, unless the gate is closed for another reason. From any thread."""
        before = self.closed
        self._reasons.discard(reason)
        if before and not self.closed:
            self._turn()

    def forget(self) -> None:
        """The connection is lost, so the tasks held here can't be acknowledged any more: the broker delivers them again."""
        self._held.clear()
        self._reasons.discard(SUSPECTS)
        attempt("forgetting suspects", "Celery", self._suspects.forget)

    def _turn(self) -> None:
        """Apply the new state in the thread that consumes. With an event loop, timers fire there; else it may be busy for long."""
        if self._consumer.hub:
            self._turned()
        elif not self._asked:
            self._asked = True
            self._consumer.call_soon(self._turned)

    def _turned(self) -> None:
        self._asked = False
        attempt("pausing the node" if self.closed else "resuming the node", "Celery", self._pause if self.closed else self._resume)

    def _take(self, request: Any) -> Any:
        if self.closed:
            self._held.append(request)
            return None
        try:
            if self._suspects.keeps(request):
                return None
        except Exception as error:
            failed("running suspects apart", "Celery", error)
        return self._start(request)

    def _pause(self) -> None:
        if self._consumer.task_consumer is not None:
            # every time, because a reconnection opens the consumer again
            self._consumer.task_consumer.cancel()
            if self._says is not None:
                log.warning("%s", self._says)
                self._says = None

    def _resume(self) -> None:
        if self._consumer.task_consumer is not None:
            self._consumer.task_consumer.consume()
        while self._held and not self.closed:
            self._take(self._held.popleft())


class Suspects:
    """Tasks that may have taken down a whole node. They run one at a time, while nothing else runs, which shows which one did it.

    All of this runs in the thread that consumes. A suspect waits until every other task has ended. Then it runs by itself for a while; if
    it runs longer than that, other tasks may start beside it again. No message that waits here is acknowledged.
    """

    def __init__(
        self, consumer: Any, start: Callable[[Any], Any], units: bool, close: Callable[[], None], open_: Callable[[], None]
    ) -> None:
        """`start` hands a task to the pool; between `close` and `open_`, tasks only start from here.

        `units`: each task that arrives here has acquired a unit of the node's semaphore.
        """
        self._consumer = consumer
        self._start = start
        self._units = units
        self._close = close
        self._open = open_
        self._next: deque[tuple[Any, float]] = deque()
        """The suspects, each with the seconds for which it runs by itself."""
        self._waiting: list[Any] = []
        """Tasks for which it is not known yet whether the node of an earlier run is gone."""
        self._running: Any = None
        self._until = 0.0
        self._armed = False

    def keeps(self, request: Any) -> bool:
        """Whether this task is kept here to be started later."""
        if not request.task.acks_late:
            return False
        turn, seconds = self._guard.redelivery.turn(request)
        if turn is Turn.NOW:
            return False
        if turn is Turn.LATER:
            self._waiting.append(request)
        else:
            self._next.append((request, seconds))
            log.warning(
                "%s may have taken down the node that it ran on: it waits until all else here has ended, to run alone", _named(request)
            )
        if self._units:
            # not at once, because that would start the next task, which may be kept as well, and so on
            self._consumer.call_soon(self._consumer.controller._quick_release)
        self._arm(RETRY_EVERY)
        return True

    def forget(self) -> None:
        """The connection is lost: tasks that wait here are delivered again."""
        self._next.clear()
        self._waiting.clear()
        self._running = None
        self._guard.redelivery.runs_alone(False)

    @property
    def _guard(self) -> PoolGuard:
        found: PoolGuard = self._consumer.pool.guard
        return found

    def _arm(self, seconds: float) -> None:
        if not self._armed:
            self._armed = True
            # in a node without an event loop, the timer has its own thread
            self._consumer.timer.call_after(seconds, self._retry if self._consumer.hub else lambda: self._consumer.call_soon(self._retry))

    def _retry(self) -> None:
        self._armed = False
        attempt("running suspects apart", "Celery", self._advance)
        if self._next or self._waiting or self._running is not None:
            self._arm(RETRY_EVERY if self._next or self._running is not None else 1.0)

    def _advance(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._consumer.on_task_request(request)
        if self._running is not None and not self._guard.runs(self._running):
            self._running = None
            self._guard.redelivery.runs_alone(False)
            if self._units:
                self._consumer.controller._quick_acquire(_nothing)  # because its end has released a unit that it did not hold
        if self._running is None and self._next:
            self._close()
            if not self._guard.jobs:
                self._run(*self._next.popleft())
        elif self._running is None or time.monotonic() >= self._until:
            self._guard.redelivery.runs_alone(False)
            self._open()

    def _run(self, request: Any, seconds: float) -> None:
        log.warning("%s runs alone, and for %d s nothing else is started here", _named(request), seconds)
        self._guard.redelivery.runs_alone(True)
        self._running, self._until = request, time.monotonic() + seconds
        self._start(request)


def _named(request: Any) -> str:
    return f"task {printable(str(request.name))}[{printable(str(request.id))}]"


def _nothing() -> None:
    """The callback of an acquired unit that is for no task."""
