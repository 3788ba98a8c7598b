"""In MainProcess: which tasks may come again, how often they have killed a child or their node, and when that was enough."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from oomsafe.celery import poison
from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.given_up import give_up
from oomsafe.celery.noting import Noting
from oomsafe.celery.poison import Poison, Standing
from oomsafe.policy.poison import GROWN, is_poison
from oomsafe.policy.text import printable

#: Brokers that say of a message that it comes again; of the others' each is looked up.
SAY_SO = ("redis", "amqp")

#: Tasks that may come again and are remembered here, so that their notes can be removed when their child is gone.
REMEMBERED = 10_000


class Turn(Enum):
    """When a task may be handed out."""

    NOW = "now"
    LATER = "when it can be known whether its node is gone"
    ALONE = "while nothing else runs here"


@dataclass
class _Late:
    """A task that is handed out, and may come again."""

    task_id: str
    first: bool
    """It has not come before, and the broker will say so when it does: until it lasts, it is not noted."""
    retried: bool
    """It has been sent again by retry(), under the same id."""
    late: bool
    """Its message is acknowledged when it has ended."""
    noted: bool = False
    """It has lasted."""


class Redelivery:
    """`allowed` deaths for memory, then a task is given up.

    What comes for the first time is noted once it has lasted for a tenth of a second, by a thread of its own: to write
    a note and remove it is two round trips, more than a short task takes. What has come before is noted by its child before it runs.
    """

    def __init__(self, make: Callable[[], Poison], allowed: int, driver: str, dry_run: bool) -> None:
        """`make`: a Poison, for this thread; `driver`: of the broker, as kombu calls its kind."""
        self._poison = make()
        self._make = make
        self._allowed = allowed
        self._dry_run = dry_run
        self._late: dict[int, _Late] = {}
        self._theirs: Poison | None = None
        self._leasing = threading.Lock()
        self._leased = False
        self._noting = Noting(self._renew_there, lambda: any(map(_is_noted, list(self._late.values()))))
        self._grown: dict[int, int] = {}
        self._looked_up: dict[int, tuple[Any, Standing]] = {}
        self._waits: dict[str, float] = {}
        self._alone = False
        self.lone_child = False
        """Whether the task that was handed out last has the only child."""
        self.says_alone = False
        """Whether this node's lease has that one task runs here alone."""
        self.says_so = driver in SAY_SO
        """Whether the broker says of a message that it comes again."""

    def turn(self, request: Any) -> tuple[Turn, float]:
        """When an acks_late task may be handed out; and for how many seconds at least nothing may be started beside it."""
        if self._dry_run or self._is_first(request):
            return Turn.NOW, 0.0
        standing = self._poison.again(request.id)
        held, now = standing.held, time.monotonic()
        if not is_poison(held.deaths, self._allowed):
            since = self._waits.setdefault(request.id, now)
            # a lease that is good for so long after it was first asked for has been renewed: its node lives
            if is_poison(held.deaths + held.doubts // 2 + standing.open, self._allowed) and standing.open and now < since + poison.LEASE:
                return Turn.LATER, 0.0
        self._waits.pop(request.id, None)
        self._looked_up[id(request)] = request, standing
        suspect = held.suspect and not is_poison(held.deaths, self._allowed)
        return (Turn.ALONE, held.alone_for) if suspect else (Turn.NOW, 0.0)

    def is_refused(self, request: Any) -> bool:
        """Before an acks_late task is handed out: whether it has been given up."""
        if self._dry_run or self._is_first(request):
            return False
        _, looked_up = self._looked_up.pop(id(request), (None, None))
        deaths = (looked_up or self._poison.again(request.id)).held.deaths
        if not is_poison(deaths, self._allowed):
            return False
        self._give_up(request, deaths, "its whole node, while it ran")
        return True

    def runs_alone(self, alone: bool) -> None:
        """The next task that is handed out runs alone, and nothing is started beside it until this says otherwise."""
        if alone != self._alone:
            self._alone = alone
            self._renew(self._poison)  # it stands before anything else begins

    def joined(self) -> None:
        """A task is about to be handed out beside another one, and this node says that it runs alone."""
        self._alone = self.lone_child = False
        self._renew(self._poison)

    def handed_out(self, ticket: int, request: Any) -> None:
        """A task that may come again, to a child."""
        retried = bool(request.request_dict.get("retries"))
        late = bool(request.task.acks_late)
        if not late and not retried:
            return
        self._late[ticket] = entry = _Late(request.id, self._is_first(request) or not late, retried, late)
        if not entry.first:
            self._noting.keep()
        while len(self._late) > REMEMBERED:
            del self._late[next(iter(self._late))]

    def lasting(self, growth: Mapping[int, int]) -> None:
        """In the watcher's thread: these have not ended at once, and have grown by so many bytes."""
        for ticket in growth:
            late = self._late.get(ticket)
            if late is not None and late.late and late.first and not late.noted:
                late.noted = True
                self._noting.submit(partial(self._note, ticket, late.task_id))
        grown = {ticket: size for ticket, size in growth.items() if size >= GROWN}
        doubled = any(size >= 2 * self._grown.get(ticket, GROWN // 2) for ticket, size in grown.items())
        # what is said of a task is what it had when it was said, until it has doubled
        self._grown = grown if doubled else {ticket: size for ticket, size in self._grown.items() if ticket in grown}
        if doubled and _any_noted(self._late):
            self._noting.renew()

    def died(self, ticket: int, request: Any, why: str) -> bool:
        """The kernel has killed it. Returns whether it has been given up; else Celery does with it as it would."""
        self._late.pop(ticket, None)
        if request is None or not comes_again(request.task):
            return False
        # a message that comes for the first time has nothing to do with those before that had the same id
        deaths = self._poison.died(request.id, anew=self._is_first(request) and not request.request_dict.get("retries"))
        if not is_poison(deaths, self._allowed) or self._dry_run:
            return False
        self._give_up(request, deaths, why)
        return True

    def ended(self, ticket: int) -> None:
        """Its child is gone, and not for memory: a limit, a revoke, an operator, an error of its own."""
        late = self._late.pop(ticket, None)
        if late is not None and _is_noted(late):
            self._poison.ended(late.task_id)

    def all_ended(self) -> None:
        """The connection is lost, or the node ends at once: what comes again comes for that reason."""
        for ticket in list(self._late):
            self.ended(ticket)
        self._looked_up.clear()
        self._waits.clear()

    def forget(self, ticket: int) -> None:
        """It has come to its end in its child, which has removed the note that it made."""
        late = self._late.pop(ticket, None)
        if late is not None and (late.noted or (late.first and late.retried)):
            self._noting.submit(partial(self._forget, late))

    def close(self) -> None:
        """No task runs any more, or none is waited for."""
        self._noting.close()
        if self._leased:
            self._poison.gives_up()

    def _is_first(self, request: Any) -> bool:
        return self.says_so and not request.delivery_info.get("redelivered")

    def _all_grown(self) -> dict[str, int]:
        """By task id; of those that are acknowledged early, nobody asks which."""
        return {late.task_id if (late := self._late.get(ticket)) else "": size for ticket, size in self._grown.items()}

    def _renew(self, notes: Poison) -> None:
        with self._leasing:  # the last one to be written is the last one to be thought of
            self._leased = True
            self.says_alone = self._alone or self.lone_child
            notes.renew(self.says_alone, self._all_grown())

    def _renew_there(self) -> None:
        """In the thread for notes."""
        self._theirs = self._theirs or self._make()
        self._renew(self._theirs)

    def _note(self, ticket: int, task_id: str) -> None:
        """In the thread for notes."""
        self._theirs = self._theirs or self._make()
        self._theirs.begins(task_id)
        # it may have come to its end meanwhile; by now even again
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
            self._poison.forgive(request.id)  # who sends one with this id again means another


def request_of(options: Mapping[str, Any]) -> Any:
    """Celery's Request, whose methods the pool calls back; None where the work is none of Celery's tasks."""
    request = getattr(options.get("error_callback"), "__self__", None)
    return request if hasattr(request, "delivery_info") and hasattr(request, "task") else None


def comes_again(task: Any) -> bool:
    """Whether Celery has a task run again whose child was lost."""
    return bool((task.acks_late and task.reject_on_worker_lost) or getattr(task, "retry_on_worker_lost", False))


def _is_noted(late: _Late) -> bool:
    return late.late and (late.noted or not late.first)


def _any_noted(late: Mapping[int, _Late]) -> bool:
    return any(map(_is_noted, list(late.values())))
