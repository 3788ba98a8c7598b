"""In MainProcess: which tasks may be redelivered, how often they have killed a child or their node, and when they are given up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from celery import signals
from celery.worker.state import task_ready

from oomsafe.celery import notes
from oomsafe.celery.errors import WorkerOutOfMemory, info_of
from oomsafe.celery.notes import Notes, Standing
from oomsafe.log import attempt, log
from oomsafe.policy.poison import GROWN, is_poison
from oomsafe.policy.text import printable

#: Brokers that mark a redelivered message. With other brokers, the notes are read for every message.
SAY_SO = ("redis", "amqp")

#: The most redeliverable tasks that are remembered here, so that their notes can be removed when their child is gone.
REMEMBERED = 10_000


class Turn(Enum):
    """When a task may be handed out."""

    NOW = "now"
    LATER = "when it can be known whether its node is gone"
    ALONE = "while nothing else runs here"


@dataclass
class _Late:
    """A task that has been handed out and may be delivered again."""

    task_id: str
    first: bool
    """It needs no note before it has run for a while: it is delivered for the first time, and the broker would mark a redelivery. Also
    true if it is acknowledged early."""
    retried: bool
    """It has been sent again by retry(), under the same id."""
    late: bool
    """Its message is acknowledged only when it has ended (acks_late)."""
    noted: bool = False
    """It has run for a while, so a note of it was submitted here."""


class Redelivery:
    """Gives a task up after more than `allowed` deaths for memory.

    A task that is delivered for the first time is noted once it has run for a tenth of a second, by a separate thread: to write
    a note and remove it takes two round trips, longer than a short task runs. A redelivered task is noted by its child before it runs.
    """

    def __init__(self, make: Callable[[], Notes], allowed: int, driver: str, dry_run: bool) -> None:
        """`make` creates a Notes for the thread that calls it; `driver` is kombu's driver_type of the broker."""
        self._notes = make()
        self._make = make
        self._allowed = allowed
        self._dry_run = dry_run
        self._late: dict[int, _Late] = {}
        self._theirs: Notes | None = None
        self._leasing = threading.Lock()
        self._leased = False
        self._notes_thread = NotesThread(self._renew_there, lambda: any(map(_is_noted, list(self._late.values()))))
        self._grown: dict[int, int] = {}
        self._looked_up: dict[int, tuple[Any, Standing]] = {}
        self._waits: dict[str, float] = {}
        self._alone = False
        self.lone_child = False
        """Whether the pool's only child runs the task that was handed out last."""
        self.says_alone = False
        """Whether this node's lease says that one task runs alone here."""
        self.says_so = driver in SAY_SO
        """Whether the broker marks a redelivered message."""

    def turn(self, request: Any) -> tuple[Turn, float]:
        """When an acks_late task may be handed out, and the least seconds for which nothing may be started beside it."""
        if self._dry_run or self._is_first(request):
            return Turn.NOW, 0.0
        standing = self._notes.again(request.id)
        held, now = standing.held, time.monotonic()
        if not is_poison(held.deaths, self._allowed):
            since = self._waits.setdefault(request.id, now)
            # a lease that is still valid after this time must have been renewed meanwhile, so its node lives
            if is_poison(held.deaths + held.doubts // 2 + standing.open, self._allowed) and standing.open and now < since + notes.LEASE:
                return Turn.LATER, 0.0
        self._waits.pop(request.id, None)
        self._looked_up[id(request)] = request, standing
        suspect = held.suspect and not is_poison(held.deaths, self._allowed)
        return (Turn.ALONE, held.alone_for) if suspect else (Turn.NOW, 0.0)

    def is_refused(self, request: Any) -> bool:
        """Called before an acks_late task is handed out: give it up if it has too many deaths. Returns whether it was given up."""
        if self._dry_run or self._is_first(request):
            return False
        _, looked_up = self._looked_up.pop(id(request), (None, None))
        deaths = (looked_up or self._notes.again(request.id)).held.deaths
        if not is_poison(deaths, self._allowed):
            return False
        self._give_up(request, deaths, "its whole node, while it ran")
        return True

    def runs_alone(self, alone: bool) -> None:
        """With True: the next task that is handed out runs alone, and nothing is started beside it until this is called with False."""
        if alone != self._alone:
            self._alone = alone
            self._renew(self._notes)  # in this thread, so that the lease is written before anything else begins

    def joined(self) -> None:
        """A task is about to be handed out beside another one, while this node's lease still says that one task runs alone."""
        self._alone = self.lone_child = False
        self._renew(self._notes)

    def handed_out(self, ticket: int, request: Any) -> None:
        """A task that may be delivered again has been handed out to a child."""
        retried = bool(request.request_dict.get("retries"))
        late = bool(request.task.acks_late)
        if not late and not retried:
            return
        self._late[ticket] = entry = _Late(request.id, self._is_first(request) or not late, retried, late)
        if not entry.first:
            self._notes_thread.keep()
        while len(self._late) > REMEMBERED:
            del self._late[next(iter(self._late))]

    def lasting(self, growth: Mapping[int, int]) -> None:
        """In the watcher's thread: these tasks did not end at once. `growth`: bytes by ticket."""
        for ticket in growth:
            late = self._late.get(ticket)
            if late is not None and late.late and late.first and not late.noted:
                late.noted = True
                self._notes_thread.submit(partial(self._note, ticket, late.task_id))
        grown = {ticket: size for ticket, size in growth.items() if size >= GROWN}
        doubled = any(size >= 2 * self._grown.get(ticket, GROWN // 2) for ticket, size in grown.items())
        # the lease keeps a task's growth as it was last written, until some task's growth has doubled
        self._grown = grown if doubled else {ticket: size for ticket, size in self._grown.items() if ticket in grown}
        if doubled and _any_noted(self._late):
            self._notes_thread.renew()

    def died(self, ticket: int, request: Any, why: str) -> bool:
        """The kernel has killed the task's child. Returns whether the task was given up; if not, Celery handles it as usual."""
        self._late.pop(ticket, None)
        if request is None or not comes_again(request.task):
            return False
        # a message that is delivered for the first time has nothing to do with earlier ones of the same id
        deaths = self._notes.died(request.id, anew=self._is_first(request) and not request.request_dict.get("retries"))
        if not is_poison(deaths, self._allowed) or self._dry_run:
            return False
        self._give_up(request, deaths, why)
        return True

    def ended(self, ticket: int) -> None:
        """The task's child is gone, but not for memory: because of a limit, a revoke, an operator, or an error of its own."""
        late = self._late.pop(ticket, None)
        if late is not None and _is_noted(late):
            self._notes.ended(late.task_id)

    def all_ended(self) -> None:
        """The connection is lost, or the node ends: this, and not a death, is why these tasks will be redelivered."""
        for ticket in list(self._late):
            self.ended(ticket)
        self._looked_up.clear()
        self._waits.clear()

    def forget(self, ticket: int) -> None:
        """The task has ended in its child, which has removed its own note of it."""
        late = self._late.pop(ticket, None)
        if late is not None and (late.noted or (late.first and late.retried)):
            self._notes_thread.submit(partial(self._forget, late))

    def close(self) -> None:
        """No task runs any more, or the node does not wait for those that do."""
        self._notes_thread.close()
        if self._leased:
            self._notes.gives_up()

    def _is_first(self, request: Any) -> bool:
        return self.says_so and not request.delivery_info.get("redelivered")

    def _all_grown(self) -> dict[str, int]:
        """Growth in bytes by task id. Tasks that are acknowledged early have the id "", because nothing needs to know which they are."""
        return {late.task_id if (late := self._late.get(ticket)) else "": size for ticket, size in self._grown.items()}

    def _renew(self, writer: Notes) -> None:
        with self._leasing:  # so that the lease written last has the newest state
            self._leased = True
            self.says_alone = self._alone or self.lone_child
            writer.renew(self.says_alone, self._all_grown())

    def _renew_there(self) -> None:
        """Renew the lease. In the notes' thread."""
        self._theirs = self._theirs or self._make()
        self._renew(self._theirs)

    def _note(self, ticket: int, task_id: str) -> None:
        """Note that the task runs. In the notes' thread."""
        self._theirs = self._theirs or self._make()
        self._theirs.begins(task_id)
        # the task may have ended meanwhile, and even run again by now
        if ticket not in self._late and task_id not in {late.task_id for late in list(self._late.values())}:
            self._theirs.ended(task_id)

    def _forget(self, late: _Late) -> None:
        self._theirs = self._theirs or self._make()
        (self._theirs.ended_well if late.noted else self._theirs.forgive)(late.task_id)

    def _give_up(self, request: Any, deaths: int, last: str) -> None:
        name = f"{printable(str(request.name))}[{printable(str(request.id))}]"
        give_up(request, WorkerOutOfMemory(
            f"task {name} is given up: it was killed for memory {deaths} times, max_oom_redeliveries={self._allowed}; last: {last}"
        ))  # fmt: skip
        if not self.says_so:
            self._notes.forgive(request.id)  # a later message with this id is another task


def request_of(options: Mapping[str, Any]) -> Any:
    """Celery's Request, whose methods the pool calls back; None if the work is not a Celery task."""
    request = getattr(options.get("error_callback"), "__self__", None)
    return request if hasattr(request, "delivery_info") and hasattr(request, "task") else None


def comes_again(task: Any) -> bool:
    """Whether Celery runs this task again when its child was lost."""
    return bool((task.acks_late and task.reject_on_worker_lost) or getattr(task, "retry_on_worker_lost", False))


def _is_noted(late: _Late) -> bool:
    return late.late and (late.noted or not late.first)


def _any_noted(late: Mapping[int, _Late]) -> bool:
    return any(map(_is_noted, list(late.values())))


class NotesThread:
    """Writes notes of tasks in a separate thread, so that no task waits for that, and renews this node's lease.

    The thread starts with the first note, and sleeps while there is nothing to write and no lease to renew.
    """

    def __init__(self, renew: Callable[[], object], wanted: Callable[[], bool]) -> None:
        """`renew` is called in the thread every RENEW seconds while `wanted()` is true, and when renew() orders it."""
        self._renew = renew
        self._wanted = wanted
        self._renewed = -notes.RENEW
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False

    def submit(self, note: Callable[[], object]) -> None:
        """Write a note soon, after those that were submitted before, and renew the lease first if it is due. From any thread."""
        if self._ended:
            return
        self._todo.put(note)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="oomsafe-notes", daemon=True)
            thread.start()  # if no thread can be started now, the next note tries again
            self._thread = thread

    def renew(self) -> None:
        """Renew the lease soon, because its content has changed. From any thread."""
        self.submit(self._now)

    def keep(self) -> None:
        """A lease is needed from now on: renew it if it is due. Costs one clock read if it is not."""
        if self._is_due():
            self._renewed = time.monotonic()
            self.renew()

    def _is_due(self) -> bool:
        return time.monotonic() >= self._renewed + notes.RENEW

    def close(self) -> None:
        """Write nothing more, except a note that is being written now."""
        self._ended = True
        self._todo.put(None)

    def _run(self) -> None:
        while not self._ended:
            pause = self._renewed + notes.RENEW - time.monotonic()
            # a lease that is due but not wanted is renewed with the next note, or by keep()
            idle = pause <= 0 and not self._wanted()
            try:
                note = self._todo.get(timeout=None if idle else max(0.0, pause))
            except queue.Empty:
                if not self._wanted():
                    continue
                note = self._now
            if note is None:
                return
            if note != self._now and self._is_due():
                attempt("renewing a lease", "Celery", self._now)
            attempt("noting a task", "Celery", note)

    def _now(self) -> None:
        self._renewed = time.monotonic()
        self._renew()


def give_up(request: Any, error: Exception) -> None:
    """Fail a task with its reason, and reject its message without requeue, so that a dead-letter exchange gets it.

    Celery's own Request.on_failure does the same, but for a lost worker it would ask the broker for another run. Each part is tried
    separately, so that the message is rejected even if the result backend is down.
    """
    log.error("%s", error)
    info = info_of(error)
    for what, step in (
        ("the failure of a task", partial(_record, request, error)),
        ("the rejection of a message", partial(request.reject, requeue=False)),
        ("the end of a task", partial(task_ready, request)),
        ("task_failure", partial(_signal, request, error, info)),
        ("the event of a task", partial(request.send_event, "task-failed", exception=repr(error), traceback=info.traceback)),
    ):
        attempt(what, "Celery", step)


def _record(request: Any, error: Exception) -> None:
    request.task.backend.mark_as_failure(request.id, error, request=request._context, store_result=request.store_errors)


def _signal(request: Any, error: Exception, info: Any) -> None:
    signals.task_failure.send(
        sender=request.task, task_id=request.id, exception=error, args=request.args, kwargs=request.kwargs,
        traceback=info.traceback, einfo=info,
    )  # fmt: skip
