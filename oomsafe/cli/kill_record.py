"""An OOM event as JSON data: docs/explain.md has the meaning of each key. Sizes in bytes, null for what is not known."""

from __future__ import annotations

from typing import Any

from oomsafe.policy.kill_advice import advice, reasons
from oomsafe.policy.oomlog.record import Charge, Event, Killed
from oomsafe.policy.why_killed import Account, Holder, Scope, ram, slot_of

#: Of the schema. A key that is added leaves it as it is; one that is removed, or changes its meaning, does not.
VERSION = 1


def record_of(account: Account) -> dict[str, Any]:
    """One event."""
    event = account.event
    return {
        "outcome": account.outcome.value,
        "scope": account.scope.value,
        "time": {"text": event.time.text, "iso": event.time.iso, "uptime_seconds": event.time.uptime},
        "host": event.host,
        "kernel": event.kernel,
        "constraint": event.constraint,
        "cgroup": _cgroup(event) if account.scope is Scope.CGROUP else None,
        "machine": _machine(account) if account.scope is not Scope.CGROUP else None,
        "invoker": _invoker(event),
        "selected": _selected(event),
        "victim": None if event.killed is None else {**_killed(event.killed), "cgroup": event.task_memcg},
        "left_in_victim": _left(event),
        "oom_group": event.group,
        "also_killed": [_killed(killed) for killed in event.also_killed],
        "allocating_task": event.allocating_task,
        "panic": event.panic,
        "page_size": account.page_size,
        "page_size_is_assumed": account.page_size_is_assumed,
        "total_pages": account.total_pages,
        "total_pages_is_least": account.total_is_least,
        "processes": [_holder(holder) for holder in account.holders],
        "processes_left_out": event.rows_left_out,
        "has_gaps": event.gaps,
        "without_scores": _without_scores(account),
        "why": reasons(account),
        "advice": advice(account),
    }


def _cgroup(event: Event) -> dict[str, Any]:
    return {
        "path": event.oom_memcg,
        **_charge("memory", event.memory),
        **_charge("memory_and_swap", event.memsw),
        **_charge("swap", event.swap),
        "kernel_usage": event.kmem.usage if event.kmem else None,
        "shmem": event.shmem,
    }


def _charge(name: str, charge: Charge | None) -> dict[str, int | None]:
    return {f"{name}_usage": charge.usage if charge else None, f"{name}_limit": charge.limit if charge else None}


def _machine(account: Account) -> dict[str, Any]:
    event, page = account.event, account.page_size

    def size(pages: int | None) -> int | None:
        return None if pages is None else pages * page

    return {
        "ram": ram(event, page),
        "swap": event.total_swap,
        "free_swap": event.free_swap,
        "shmem": size(event.shmem_pages),
        "unreclaimable_slab": size(event.slab_pages),
        "huge_pages": event.hugepages,
    }


def _invoker(event: Event) -> dict[str, Any] | None:
    if event.invoker is None:
        return None
    return {"comm": event.invoker, "thread": event.invoker_thread, "oom_score_adj": event.invoker_score_adj, "order": event.order}


def _selected(event: Event) -> dict[str, Any] | None:
    return None if event.chosen_pid is None else {"pid": event.chosen_pid, "comm": event.chosen_comm, "score": event.chosen_score}


def _killed(killed: Killed) -> dict[str, Any]:
    return {
        "pid": killed.pid,
        "comm": killed.comm,
        "uid": killed.uid,
        "total_vm": killed.total_vm,
        "anon": killed.anon,
        "file": killed.file,
        "shmem": killed.shmem,
        "pgtables": killed.pgtables,
        "oom_score_adj": killed.oom_score_adj,
        "slot": slot_of(killed.comm),
    }


def _left(event: Event) -> dict[str, Any] | None:
    left = event.left
    return None if left is None else {"anon": left.anon, "file": left.file, "shmem": left.shmem}


def _holder(holder: Holder) -> dict[str, Any]:
    return {
        "pid": holder.pid,
        "comm": holder.comm,
        "uid": holder.uid,
        "rss": holder.rss,
        "anon": holder.anon,
        "file": holder.file,
        "shmem": holder.shmem,
        "swap": holder.swap,
        "pgtables": holder.pgtables,
        "oom_score_adj": holder.oom_score_adj,
        "points": holder.points,
        "slot": holder.slot,
    }


def _without_scores(account: Account) -> dict[str, Any] | None:
    other, killed = account.without_scores, account.event.killed
    if other is None:
        return None
    return {"pid": other.pid, "comm": other.comm, "slot": other.slot, "is_victim": killed is not None and other.pid == killed.pid}
