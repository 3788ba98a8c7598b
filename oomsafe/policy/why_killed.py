"""Why the OOM killer took this process: its points computed again, and who would have been taken without the scores."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from statistics import median

from oomsafe.policy.oomlog.record import Event, Row
from oomsafe.policy.readers import SCORE_MAX, SCORE_MIN
from oomsafe.policy.victims import PAGE_SIZE, badness

#: Page sizes that Linux runs with, and how far the figures of one process may be apart: it goes on while the table is printed.
PAGE_SIZES, TOLERANCE = (4096, 8192, 16384, 65536, 262144), 1.4

_WORKER = re.compile(r"oomsafe-w(\d{1,5})-([0-9a-f]{0,4})")


class Outcome(Enum):
    """What the kernel did."""

    KILLED = "killed"
    GROUP_KILLED = "group killed"
    """memory.oom.group: the whole cgroup."""
    NONE_KILLABLE = "none killable"
    PANIC = "panic"
    UNKNOWN = "unknown"
    """The end of the report is not in the log."""


class Scope(Enum):
    """What ran out."""

    CGROUP = "cgroup"
    MACHINE = "machine"
    NODES = "nodes"
    """Those nodes of the machine's memory that a cpuset or a memory policy allows."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process of the table. Sizes in bytes; None: not in the table."""

    pid: int
    comm: str
    uid: int | None
    rss: int | None
    anon: int | None
    file: int | None
    shmem: int | None
    swap: int | None
    pgtables: int | None
    oom_score_adj: int | None
    held_pages: int | None
    """Its points without its score: rss, swap and page tables, in pages."""
    points: int | None
    """Its points, in pages, as the kernel counts since 4.17; None: a figure is missing, or it is exempt."""
    slot: int | None
    """If it is a worker of oomsafe's: its slot."""

    @property
    def is_exempt(self) -> bool:
        """The kernel never takes it."""
        return self.oom_score_adj == SCORE_MIN or self.pid == 1

    @property
    def size(self) -> int:
        """What to compare it by where its points are not known: bytes resident and in swap."""
        return (self.rss or 0) + (self.swap or 0)


@dataclass(frozen=True, kw_only=True)
class Account:
    """An event with what can be computed from it."""

    event: Event
    outcome: Outcome
    scope: Scope
    page_size: int
    page_size_is_assumed: bool
    """The log does not tell it."""
    total_pages: int | None
    """What a score counts in thousandths of: the cgroup's limit and the swap that it may use, or the machine's RAM and swap."""
    total_is_least: bool
    """It may be more: how much swap there is is not in the log."""
    holders: tuple[Holder, ...]
    """The most points first."""
    victim: Holder | None
    """The killed process's row."""
    without_scores: Holder | None
    """Whom the kernel would have chosen if every oom_score_adj had been 0, except those of -1000; None: the log does not tell."""
    slot: int | None
    """If the victim was a worker of oomsafe's: its slot."""

    @property
    def limit(self) -> int | None:
        """The limit that was met, in bytes: the cgroup's, or the machine's memory without swap."""
        event = self.event
        if self.scope is Scope.CGROUP:
            return event.memory.limit if event.memory else None
        return ram(event, self.page_size) if self.scope is Scope.MACHINE else None

    @property
    def victim_size(self) -> int | None:
        """Bytes that the victim held resident."""
        killed = self.event.killed
        if killed is not None and killed.anon is not None:
            return killed.anon + (killed.file or 0) + (killed.shmem or 0)
        return self.victim.rss if self.victim else None

    @property
    def most_points(self) -> Holder | None:
        """Who has the most points by this computation; None: they are not known of everybody."""
        able = [holder for holder in self.holders if not holder.is_exempt]
        return able[0] if able and all(holder.points is not None for holder in able) else None

    @property
    def is_whole(self) -> bool:
        """Whether the table has every process that could have been chosen."""
        return self.event.has_table and bool(self.holders) and not self.event.rows_left_out and not self.event.gaps

    def alike(self) -> list[Holder]:
        """Processes of one make that share the memory evenly: workers. Three or more, with most of what all hold; else none."""
        families: dict[str, list[Holder]] = {}
        for holder in self.holders:
            families.setdefault("oomsafe-w" if holder.slot is not None else holder.comm, []).append(holder)
        held = sum(holder.size for holder in self.holders)
        for family in families.values():
            middle = median(holder.size for holder in family)
            near = [holder for holder in family if middle / 2 <= holder.size <= 2 * middle]
            # a supervisor of the same name, which holds less, may be among them
            if len(near) >= 3 and max(holder.size for holder in family) <= 2 * middle and sum(holder.size for holder in near) > 0.6 * held:
                return near
        return []


def account_of(event: Event) -> Account:
    """What can be computed from an event."""
    page_size = _page_size(event)
    assumed, page_size = page_size is None, page_size or PAGE_SIZE
    scope = _scope(event)
    total, is_least = _total_pages(event, scope, page_size)
    holders = [_holder(row, page_size, total) for row in event.rows]
    points_known = all(holder.points is not None for holder in holders if not holder.is_exempt)
    holders.sort(key=lambda holder: (holder.is_exempt, -(holder.points or 0) if points_known else -holder.size, holder.pid))
    killed = event.killed
    victim = next((holder for holder in holders if killed is not None and holder.pid == killed.pid), None)
    return Account(
        event=event,
        outcome=_outcome(event),
        scope=scope,
        page_size=page_size,
        page_size_is_assumed=assumed,
        total_pages=total,
        total_is_least=is_least,
        holders=tuple(holders),
        victim=victim,
        without_scores=_without_scores(event, holders),
        slot=slot_of(killed.comm) if killed else None,
    )


def slot_of(comm: str) -> int | None:
    """The slot of a worker of oomsafe's, by its process name; None: it is none."""
    match = _WORKER.fullmatch(comm)
    return int(match[1]) if match else None


def ram(event: Event, page_size: int) -> int | None:
    """Bytes of the machine's memory that can be used."""
    return None if event.ram_pages is None else max(0, event.ram_pages - (event.reserved_pages or 0)) * page_size


def kernel_is_before(event: Event, major: int, minor: int) -> bool:
    """Whether the report is of an older kernel, by its release or its format; False if that can't be told."""
    if event.kernel and (match := re.match(r"(\d{1,3})\.(\d{1,3})", event.kernel)):
        return (int(match[1]), int(match[2])) < (major, minor)
    if (major, minor) >= (4, 15) and event.rows and event.rows[0].pgtables_bytes is None:
        return True  # the table of 4.15 has pgtables_bytes
    return (major, minor) >= (5, 1) and event.chosen_score is not None


def _page_size(event: Event) -> int | None:
    """Its page size: the victim's line has kB, the table has pages. None: one of them is missing."""
    killed = event.killed
    row = next((row for row in event.rows if killed is not None and row.pid == killed.pid), None)
    if killed is None or row is None:
        return None
    resident = None if killed.anon is None else killed.anon + (killed.file or 0) + (killed.shmem or 0)
    for size, pages in ((killed.total_vm, row.total_vm), (resident, row.rss)):
        if size and pages and pages > 0:
            near = min(PAGE_SIZES, key=lambda one: abs(one - size / pages))
            if 1 / TOLERANCE < size / pages / near < TOLERANCE:
                return near
    return None


def _scope(event: Event) -> Scope:
    if event.constraint in ("CONSTRAINT_CPUSET", "CONSTRAINT_MEMORY_POLICY"):
        return Scope.NODES
    return {True: Scope.CGROUP, False: Scope.MACHINE, None: Scope.UNKNOWN}[event.is_memcg]


def _outcome(event: Event) -> Outcome:
    if event.panic:
        return Outcome.PANIC
    if event.no_killable:
        return Outcome.NONE_KILLABLE
    if event.killed is None:
        return Outcome.UNKNOWN
    return Outcome.GROUP_KILLED if event.group else Outcome.KILLED


def _total_pages(event: Event, scope: Scope, page_size: int) -> tuple[int | None, bool]:
    """(totalpages, whether it may be more), as constrained_alloc() has it: mem_cgroup_get_max(), or totalram_pages() + total_swap_pages."""
    if scope is Scope.MACHINE:
        own = ram(event, page_size)
        return (None, False) if own is None else ((own + (event.total_swap or 0)) // page_size, event.total_swap is None)
    if scope is not Scope.CGROUP or event.memory is None or event.memory.limit is None:
        return None, False
    limit = event.memory.limit
    if event.memsw is not None and event.memsw.limit is not None:
        swap: int | None = max(0, event.memsw.limit - limit)
    else:
        swap = event.swap.limit if event.swap is not None else None
    # no more swap counts than the machine has, which a cgroup's report does not tell
    return limit // page_size, swap != 0


def _holder(row: Row, page_size: int, total: int | None) -> Holder:
    tables = row.nr_ptes if row.pgtables_bytes is None else max(0, row.pgtables_bytes) // page_size
    held = None if row.rss is None or row.swapents is None or tables is None else row.rss + row.swapents + tables
    adj = row.oom_score_adj
    points = None
    if held is not None and adj is not None and SCORE_MIN < adj <= SCORE_MAX and row.pid != 1 and (adj == 0 or total is not None):
        points = int(badness(held, adj, total or 0, page=1))  # all of them in pages

    def size(pages: int | None) -> int | None:
        return None if pages is None else max(0, pages) * page_size

    return Holder(
        pid=row.pid,
        comm=row.comm,
        uid=row.uid,
        rss=size(row.rss),
        anon=size(row.rss_anon),
        file=size(row.rss_file),
        shmem=size(row.rss_shmem),
        swap=size(row.swapents),
        pgtables=size(tables) if row.pgtables_bytes is None else max(0, row.pgtables_bytes),
        oom_score_adj=adj,
        held_pages=held,
        points=points,
        slot=slot_of(row.comm),
    )


def _without_scores(event: Event, holders: list[Holder]) -> Holder | None:
    able = [holder for holder in holders if not holder.is_exempt and holder.rss is not None]
    if not able or event.allocating_task or event.order == -1 or event.rows_left_out:
        return None
    known = all(holder.held_pages is not None for holder in able)
    return max(able, key=lambda holder: ((holder.held_pages or 0) if known else holder.size, holder.pid))
