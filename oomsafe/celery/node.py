"""A step of a node's consumer: once a second it looks at the node's memory. Its timer is Celery's own; no thread of ours."""

from __future__ import annotations

import time
from typing import Any

from celery import bootsteps
from celery.worker.consumer.tasks import Tasks

from oomsafe.celery.intake import Gate
from oomsafe.celery.pool import TaskPool
from oomsafe.celery.pool_guard import PoolGuard
from oomsafe.celery.telling import brief, node_told, pool_told
from oomsafe.log import attempt, log
from oomsafe.policy.limits import resolve_limits
from oomsafe.policy.shedding import RESUME_AT, Child, Intake, shed
from oomsafe.policy.state import State
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.view import PoolView, WorkerView
from oomsafe.supervisor.supervisor import Supervisor

#: Seconds between two looks.
LOOK_EVERY = 1.0

#: Seconds between two events for monitors, while events are on.
TELL_EVERY = 5.0


class Node(bootsteps.StartStopStep):  # type: ignore[misc]
    """Of a node whose pool is ours."""

    name = "oomsafe.Node"
    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.enabled = isinstance(consumer.pool, TaskPool)
        self._gate = attempt("the gate", "Celery", lambda: Gate(consumer)) if self.enabled else None
        self._intake = Intake()
        self._fresh: dict[int, int] = {}
        self._timer: Any = None
        self._tell_at = 0.0
        self.used: int | None = None
        """What the node holds as its budget counts it, in bytes, at the last look; None: that can't be told."""
        consumer.oomsafe_node = self

    @property
    def paused(self) -> bool:
        """Whether it starts no new task."""
        return self._intake.paused

    def start(self, consumer: Any) -> None:
        """At each connection."""
        self._timer = consumer.timer.call_repeatedly(
            LOOK_EVERY, lambda: attempt("the look at the node", "Celery", lambda: self._look(consumer))
        )

    def stop(self, consumer: Any) -> None:
        """At the end of each."""
        if self._timer is not None:
            consumer.timer.cancel(self._timer)
            self._timer = None
        if self._gate is not None:
            self._gate.forget()

    shutdown = stop

    def _look(self, consumer: Any) -> None:
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
        if events and events.enabled and now >= self._tell_at:
            self._tell_at = now + TELL_EVERY
            events.send("worker-memory", **brief({**pool_told(pool), **node_told(consumer)}))

    def _keep_to_budget(self, supervisor: Supervisor, pool: PoolView) -> None:
        now, workers = time.monotonic(), pool.workers
        _, budget, used = supervisor.reading()
        self.used = used
        before = self._intake
        self._intake, victim = shed(before, used, budget, [self._child(worker) for worker in workers], now)
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

    def _child(self, worker: WorkerView) -> Child:
        held, serves = worker.figures.anon or 0, worker.state is State.SERVING
        if serves and held:
            self._fresh[worker.generation] = min(held, self._fresh.get(worker.generation, held))
        return Child(worker.generation, held, self._fresh.get(worker.generation, held), serves, not worker.in_flight)
