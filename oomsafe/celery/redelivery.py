"""In MainProcess: which tasks may come again, how often they have killed a child, and when that was enough."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.given_up import give_up
from oomsafe.celery.poison import Poison
from oomsafe.policy.poison import is_poison
from oomsafe.policy.text import printable
from oomsafe.pool.log import attempt

#: Brokers that say of a message that it comes again; of the others' each is looked up.
SAY_SO = ("redis", "amqp")

#: Tasks that may come again and are remembered here, so that their notes can be removed when their child is gone.
REMEMBERED = 10_000


@dataclass
class _Late:
    """A task that is handed out, and may come again."""

    task_id: str
    first: bool
    """It has not come before, and the broker will say so when it does: until it lasts, it is not noted."""
    noted: bool = False
    """It has lasted."""


class Redelivery:
    """`allowed` deaths for memory, then a task is given up.

    What comes for the first time is noted once it has lasted for a tenth of a second, by a thread of its own: to write
    a note and remove it is two round trips, more than a short task takes. What has come before is noted by its child before it runs.
    """

    def __init__(self, poison: Callable[[], Poison], allowed: int, driver: str, dry_run: bool) -> None:
        """`poison`: makes one, for this thread; `driver`: of the broker, as kombu calls its kind."""
        self._poison = poison()
        self._make = poison
        self._allowed = allowed
        self._dry_run = dry_run
        self._late: dict[int, _Late] = {}
        self._notes = ThreadPoolExecutor(1, "oomsafe-notes")
        self._theirs: Poison | None = None
        self.says_so = driver in SAY_SO
        """Whether the broker says of a message that it comes again."""

    def is_refused(self, request: Any) -> bool:
        """Before an acks_late task is handed out: whether it has been given up."""
        if self._dry_run or self._is_first(request):
            return False
        deaths = self._poison.again(request.id)
        if not is_poison(deaths, self._allowed):
            return False
        self._give_up(request, deaths, "its whole node, while it ran")
        return True

    def handed_out(self, ticket: int, request: Any) -> None:
        """An acks_late task, to a child."""
        self._late[ticket] = _Late(request.id, self._is_first(request))
        while len(self._late) > REMEMBERED:
            del self._late[next(iter(self._late))]

    def lasting(self, tickets: set[int]) -> None:
        """In the watcher's thread: these have not ended at once."""
        for ticket in tickets:
            late = self._late.get(ticket)
            if late is not None and late.first and not late.noted:
                late.noted = True
                self._notes.submit(attempt, "noting a task", "Celery", partial(self._note, ticket, late.task_id))

    def died(self, ticket: int, request: Any, why: str) -> bool:
        """The kernel has killed it. Returns whether it has been given up; else Celery does with it as it would."""
        self._late.pop(ticket, None)
        if request is None or not _comes_again(request.task):
            return False
        deaths = self._poison.died(request.id)
        if not is_poison(deaths, self._allowed) or self._dry_run:
            return False
        self._give_up(request, deaths, why)
        return True

    def ended(self, ticket: int) -> None:
        """Its child is gone, and not for memory: a limit, a revoke, an operator, an error of its own."""
        late = self._late.pop(ticket, None)
        if late is not None and (late.noted or not late.first):
            self._poison.ended(late.task_id)

    def all_ended(self) -> None:
        """The connection is lost, or the node ends at once: what comes again comes for that reason."""
        for ticket in list(self._late):
            self.ended(ticket)

    def forget(self, ticket: int) -> None:
        """It has come to its end in its child, which has removed the note that it made."""
        late = self._late.pop(ticket, None)
        if late is not None and late.noted:
            self._notes.submit(attempt, "noting a task", "Celery", partial(self._forget, late.task_id))

    def close(self) -> None:
        """No task runs any more, or none is waited for."""
        self._notes.shutdown(wait=False, cancel_futures=True)

    def _is_first(self, request: Any) -> bool:
        return self.says_so and not request.delivery_info.get("redelivered")

    def _note(self, ticket: int, task_id: str) -> None:
        """In the thread for notes."""
        self._theirs = self._theirs or self._make()
        self._theirs.begins(task_id)
        # it may have come to its end meanwhile; by now even again
        if ticket not in self._late and task_id not in {late.task_id for late in list(self._late.values())}:
            self._theirs.ended(task_id)

    def _forget(self, task_id: str) -> None:
        self._theirs = self._theirs or self._make()
        self._theirs.ended(task_id)

    def _give_up(self, request: Any, deaths: int, last: str) -> None:
        name = f"{printable(str(request.name))}[{printable(str(request.id))}]"
        give_up(request, WorkerOutOfMemory(
            f"task {name} is given up: it was killed for memory {deaths} times, max_oom_redeliveries={self._allowed}; last: {last}"
        ))  # fmt: skip


def request_of(options: dict[str, Any]) -> Any:
    """Celery's Request, whose methods the pool calls back; None where the work is none of Celery's tasks."""
    request = getattr(options.get("error_callback"), "__self__", None)
    return request if hasattr(request, "delivery_info") and hasattr(request, "task") else None


def _comes_again(task: Any) -> bool:
    return bool((task.acks_late and task.reject_on_worker_lost) or getattr(task, "retry_on_worker_lost", False))
