"""In MainProcess: which tasks may come again, how often they have killed a child, and when that was enough."""

from __future__ import annotations

from typing import Any

from oomsafe.celery.errors import WorkerOutOfMemory
from oomsafe.celery.given_up import give_up
from oomsafe.celery.poison import Poison
from oomsafe.policy.poison import is_poison
from oomsafe.policy.text import printable

#: Brokers that say of a message that it comes again; of the others' each is looked up.
SAY_SO = ("redis", "amqp")

#: Tasks that may come again and are remembered here, so that their notes can be removed when their child is gone.
REMEMBERED = 10_000


class Redelivery:
    """`allowed` deaths for memory, then a task is given up."""

    def __init__(self, poison: Poison, allowed: int, driver: str, dry_run: bool) -> None:
        """`driver`: of the broker, as kombu calls its kind."""
        self._poison = poison
        self._allowed = allowed
        self._says_so = driver in SAY_SO
        self._dry_run = dry_run
        self._late: dict[int, str] = {}

    def is_refused(self, request: Any) -> bool:
        """Before a task is handed out: whether it has been given up."""
        if request is None or not request.task.acks_late or self._dry_run:
            return False
        if self._says_so and not request.delivery_info.get("redelivered"):
            return False
        deaths = self._poison.again(request.id)
        if not is_poison(deaths, self._allowed):
            return False
        self._give_up(request, deaths, "its whole node, while it ran")
        return True

    def handed_out(self, ticket: int, request: Any) -> None:
        """To a child, which notes that it begins."""
        if request is not None and request.task.acks_late:
            self._late[ticket] = request.id
            while len(self._late) > REMEMBERED:
                del self._late[next(iter(self._late))]

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
        task_id = self._late.pop(ticket, None)
        if task_id is not None:
            self._poison.ended(task_id)

    def all_ended(self) -> None:
        """The connection is lost, or the node ends at once: what comes again comes for that reason."""
        for ticket in list(self._late):
            self.ended(ticket)

    def forget(self, ticket: int) -> None:
        """It has come to its end in its child, which has removed its own note."""
        self._late.pop(ticket, None)

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
