"""What one OOM report says. A figure that is not in the log is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """A process in the report's table, in the kernel's own units: memory in pages, except pgtables_bytes."""

    pid: int
    uid: int | None = None
    tgid: int | None = None
    total_vm: int | None = None
    rss: int | None = None
    rss_anon: int | None = None
    rss_file: int | None = None
    rss_shmem: int | None = None
    pgtables_bytes: int | None = None
    """Page tables in bytes (Linux 4.15)."""
    nr_ptes: int | None = None
    """Page tables in pages: nr_ptes, nr_pmds and nr_puds together (before 4.15)."""
    swapents: int | None = None
    oom_score_adj: int | None = None
    comm: str = ""


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A ``Killed process`` line. Sizes in bytes."""

    pid: int
    comm: str
    message: str = ""
    """What stands before it: ``Memory cgroup out of memory``; empty before Linux 5.1."""
    uid: int | None = None
    total_vm: int | None = None
    anon: int | None = None
    file: int | None = None
    shmem: int | None = None
    pgtables: int | None = None
    oom_score_adj: int | None = None


@dataclass(frozen=True, kw_only=True)
class Left:
    """What the OOM reaper could not take from a victim at once, in bytes (``oom_reaper: reaped process``, Linux 4.6)."""

    pid: int
    anon: int | None = None
    file: int | None = None
    shmem: int | None = None


@dataclass(frozen=True, kw_only=True)
class Charge:
    """A counter of the cgroup that ran out, in bytes; `limit` None: no limit."""

    usage: int
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class Time:
    """When a line was logged, as far as the log tells."""

    text: str | None = None
    """The time as it stands in the log."""
    iso: str | None = None
    """ISO 8601, with an offset from UTC only if the log has one."""
    uptime: float | None = None
    """Seconds since boot, by the kernel's clock."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One report of the OOM killer, as much of it as the log has."""

    time: Time
    host: str | None = None
    kernel: str | None = None
    """Its release, such as 6.18.44."""
    invoker: str | None = None
    """The name of the process that asked for the memory."""
    invoker_thread: int | None = None
    invoker_score_adj: int | None = None
    order: int | None = None
    """2 ** order pages were asked for; -1: somebody asked for a kill (SysRq-f)."""
    constraint: str | None = None
    """CONSTRAINT_MEMCG, _NONE, _CPUSET, _MEMORY_POLICY (Linux 5.0)."""
    is_memcg: bool | None = None
    """Whether a memory cgroup ran out, and not the machine; None: the log does not tell."""
    oom_memcg: str | None = None
    """The path of the cgroup that ran out."""
    task_memcg: str | None = None
    """The path of the victim's cgroup."""
    memory: Charge | None = None
    memsw: Charge | None = None
    """Memory and swap together (cgroup v1)."""
    swap: Charge | None = None
    """Swap (cgroup v2)."""
    kmem: Charge | None = None
    shmem: int | None = None
    """Bytes of shared memory and tmpfs in the cgroup, or in the machine if is_memcg is False."""
    ram_pages: int | None = None
    reserved_pages: int | None = None
    slab_pages: int | None = None
    """Unreclaimable slab in the machine."""
    shmem_pages: int | None = None
    hugepages: int | None = None
    """Bytes of huge pages that are set apart, used or not."""
    total_swap: int | None = None
    """Bytes of the machine's swap."""
    free_swap: int | None = None
    rows: tuple[Row, ...] = ()
    rows_left_out: int = 0
    """Rows beyond the most that are kept."""
    has_table: bool = False
    chosen_pid: int | None = None
    """Whom the kernel selected. Until Linux 5.0 it may have killed a child in its place."""
    chosen_comm: str | None = None
    chosen_score: int | None = None
    """The kernel's own score in thousandths, of a ``Kill process`` line (until Linux 5.0)."""
    killed: Killed | None = None
    also_killed: tuple[Killed, ...] = ()
    """The rest of its cgroup, which dies with it (memory.oom.group)."""
    group: str | None = None
    """The path of the cgroup whose memory.oom.group is set."""
    allocating_task: bool = False
    """The kernel did not choose: vm.oom_kill_allocating_task kills whoever asks."""
    no_killable: bool = False
    panic: str | None = None
    """Why the kernel panicked."""
    left: Left | None = None
    gaps: bool = False
    """Lines are missing: the beginning is not in the log, or the kernel dropped messages."""
