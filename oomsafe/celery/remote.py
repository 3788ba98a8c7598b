"""Celery's own ways of looking: ``celery -A proj inspect memory`` and ``celery -A proj control memory_recycle``."""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, inspect_command

from oomsafe.celery.telling import node_told, pool_told
from oomsafe.policy.state import State
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.worker.guard import Guard

UNGUARDED = {"error": "the pool of this node is not guarded: call oomsafe.celery.install(app) where the app is made"}

UNSEEN = {"error": "this node could make no scoreboard, so it goes on without: its log says why"}


@inspect_command()  # type: ignore[untyped-decorator]
def memory(state: Any) -> dict[str, Any]:
    """The node's children: what they hold, their limits, the task in flight; who died for memory. Bytes and seconds; null is not known."""
    supervisor, guard = _supervisor(state), getattr(state.consumer, "oomsafe_guard", None)
    if isinstance(guard, Guard):
        return {**pool_told(guard.pool()), **node_told(state.consumer)}
    if supervisor is None or supervisor.board is None:
        return UNGUARDED if supervisor is None else UNSEEN
    return {**pool_told(supervisor.board.read()), **node_told(state.consumer)}


@control_command()  # type: ignore[untyped-decorator]
def memory_recycle(state: Any) -> dict[str, Any]:
    """Recycle the node's biggest child once its current task is done."""
    supervisor = _supervisor(state)
    if hasattr(state.consumer, "oomsafe_guard"):
        return {"error": "all tasks of this node run in one process: shut it down warmly, and start it again"}
    if supervisor is None or supervisor.board is None:
        return UNGUARDED if supervisor is None else UNSEEN
    workers = [worker for worker in supervisor.board.read().workers if worker.state is State.SERVING]
    if not workers:
        return {"error": "no child serves just now"}
    biggest = max(workers, key=lambda worker: worker.figures.anon or 0)
    if supervisor.policy.dry_run:
        return {"error": f"dry run: child {biggest.pid} would be recycled once its current task is done; nothing is done"}
    supervisor.tell_to_drain(biggest.slot, biggest.generation)
    return {"ok": f"child {biggest.pid} is recycled once its current task is done"}


def _supervisor(state: Any) -> Supervisor | None:
    found = getattr(getattr(state.consumer.pool, "guard", None), "supervisor", None)
    return found if isinstance(found, Supervisor) else None
