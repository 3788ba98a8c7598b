"""In MainProcess: ``celery -A proj inspect memory``, ``celery -A proj control memory_recycle``, and the events for monitors.

Processes that only send tasks import this too, because install() registers the commands. So modules that only a node needs are imported
inside functions.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from celery.worker.control import control_command, inspect_command

from oomsafe.policy.state import State

if TYPE_CHECKING:
    from oomsafe.celery.pool_guard import PoolGuard
    from oomsafe.scoreboard.view import PoolView, WorkerView
    from oomsafe.supervisor.deaths import Death
    from oomsafe.supervisor.supervisor import Supervisor

#: The most children that are shown, the biggest first.
MOST = 64

UNGUARDED = {"error": "the pool of this node is not guarded: call oomsafe.celery.install(app) where the app is made"}

UNSEEN = {"error": "this node could make no scoreboard, so it goes on without: its log says why"}


@inspect_command()  # type: ignore[untyped-decorator]
def memory(state: Any) -> dict[str, Any]:
    """The node's children: memory, limits, the task in flight; which ones died for memory. Bytes and seconds; null: not known."""
    supervisor, guard = _supervisor(state), getattr(state.consumer, "oomsafe_guard", None)
    from oomsafe.scoreboard.live import live

    if guard is not None:
        return {**pool_record(live(guard.pool())), **node_record(state.consumer)}
    if supervisor is None or supervisor.board is None:
        return UNGUARDED if supervisor is None else UNSEEN
    return {**pool_record(live(supervisor.board.read())), **node_record(state.consumer)}


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
    guard = _guard_of(state.consumer)
    return None if guard is None else guard.supervisor


def _guard_of(consumer: Any) -> PoolGuard | None:
    from oomsafe.celery.pool_guard import PoolGuard

    found = getattr(consumer.pool, "guard", None)
    return found if isinstance(found, PoolGuard) else None


def pool_record(pool: PoolView) -> dict[str, Any]:
    """The pool's children, its limits, its totals. Bytes and seconds; None is not known."""
    children = sorted((_child(worker) for worker in pool.workers), key=lambda child: -(child["rss"] or 0))
    return {
        "name": pool.name,
        "children": children[:MOST],
        "children_left_out": max(0, len(children) - MOST),
        "limit": pool.limit,
        "others": pool.others,
        "budget": pool.budget,
        "tasks": pool.totals.work,
        "recycles": {reason: count for reason, count in pool.totals.by_reason.items() if count},
        "reclaimed": pool.totals.reclaimed,
    }


def node_record(consumer: Any) -> dict[str, Any]:
    """What the whole node holds, in bytes, and whether it has paused; None: not measured yet. Which children have died for memory."""
    node, guard = getattr(consumer, "oomsafe_node", None), _guard_of(consumer)
    return {
        "working_set": getattr(node, "used", None),
        "paused": getattr(node, "paused", None),
        "deaths": {} if guard is None else {end.value: count for end, count in guard.deaths.counts.items() if not end.in_order},
        "last_deaths": [] if guard is None else [_death(death) for death in guard.deaths.last],
    }


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """The same in a shorter form, because it is sent every few seconds."""
    kept = ("pid", "state", "tasks", "rss", "soft", "in_flight")
    short = {name: figure for name, figure in record.items() if name != "last_deaths"}
    return {**short, "children": [{name: child[name] for name in kept} for child in record["children"]]}


def _death(death: Death) -> dict[str, Any]:
    name, task_id = death.work or (None, None)
    return {"at": death.at, "task": name, "id": task_id, "pid": death.pid, "rss": death.rss, "verdict": death.end}


def _child(worker: WorkerView) -> dict[str, Any]:
    figures = {name: figure for name, figure in asdict(worker.figures).items() if name not in ("in_flight", "file_dirty")}
    flight = [{"task": work.name, "began": work.began, "rss_then": work.rss, "growth": worker.grown(work)} for work in worker.in_flight]
    return {
        "pid": worker.pid,
        "state": worker.state.value,
        "tasks": worker.counters.work,
        **figures,
        "measured": worker.measured,
        "in_flight": flight,
    }
