"""What `oomsafe doctor` knows about a machine, a container and the pools in it. Sizes in bytes; None: it could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from oomsafe.policy.limits import Kind, Level, tightest
from oomsafe.policy.victims import PAGE_SIZE, Candidate, ranked, supervisor_margin

#: What the kernel writes for "no limit" in a process's limits.
UNLIMITED = -1


class Container(Enum):
    """What kind of machine these processes see."""

    NONE = "none"
    DOCKER = "Docker"
    PODMAN = "Podman"
    KUBERNETES = "Kubernetes"
    LXC = "LXC"
    WSL = "WSL"
    NSPAWN = "systemd-nspawn"
    OTHER = "a container"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the machine's owner has set for the kernel (Documentation/admin-guide/sysctl/vm.rst)."""

    panic_on_oom: int | None = None
    oom_kill_allocating_task: int | None = None
    overcommit_memory: int | None = None
    swappiness: int | None = None
    huge_pages: str | None = None
    """Transparent huge pages: ``always``, ``madvise`` or ``never``."""
    migrates_requests: bool | None = None
    """net.ipv4.tcp_migrate_req."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A systemd service, as ``systemctl show`` gives it; an empty text: this version of systemd has no such property."""

    name: str
    oom_policy: str = ""
    memory_max: str = ""
    memory_high: str = ""
    oom_score_adjust: str = ""
    limit_data: str = ""
    tasks_current: int | None = None
    tasks_max: int | None = None
    """None also if there is no limit."""
    killed_for_pressure: bool = False
    """systemd-oomd may kill all of it (ManagedOOMMemoryPressure= or ManagedOOMSwap= is ``kill``, for it or for a slice above it)."""
    preference: str = ""
    """ManagedOOMPreference."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Whom the kernel takes if one level is out of memory."""

    level: Level
    total: int
    """What scores are thousandths of."""
    candidates: tuple[Candidate, ...]
    unseen: bool = False
    """Whether there are others that can't be seen from here."""
    page: int = PAGE_SIZE

    @property
    def order(self) -> list[Candidate]:
        """First the one that the kernel takes first."""
        return ranked(self.candidates, self.total, self.page)

    def margin(self, supervisor: Candidate, workers: tuple[Candidate, ...]) -> float | None:
        """supervisor_margin()."""
        return supervisor_margin(supervisor, workers, self.total, self.page)


@dataclass(frozen=True, kw_only=True)
class Program:
    """How a process was started, and what that decides about its memory."""

    python: str = ""
    """``3.12``; empty: not known."""
    free_threaded: bool = False
    malloc: str = ""
    """``glibc``, ``musl``, ``jemalloc``, ``mimalloc`` or ``tcmalloc``; empty: not known."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the variables that steer allocators, those that are set."""
    reuse_port: bool = False
    limit_data: int | None = None
    """RLIMIT_DATA's soft value; UNLIMITED: none."""
    limit_address_space: int | None = None
    """The same of RLIMIT_AS."""


@dataclass(frozen=True, kw_only=True)
class Reckoned:
    """What a pool that oomsafe guards knows about itself."""

    wanted: int
    """How many workers it should have."""
    budget: int | None = None
    held: int | None = None
    others: int | None = None
    limit: int | None = None
    soft: int | None = None
    """The lowest soft limit of its workers."""
    fresh: int | None = None
    """The most that one of its workers held right after boot."""
    biggest: int | None = None
    """The most that one of its workers holds now."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A server and its workers."""

    server: str
    """gunicorn, uvicorn, celery, …"""
    name: str = ""
    supervisor: Candidate
    workers: tuple[Candidate, ...]
    levels: tuple[Level, ...] = ()
    """The nearest first, the machine last."""
    rankings: tuple[Ranking, ...] = ()
    """For the level that leaves it least, and for the machine."""
    dies_whole: str | None = None
    """The cgroup that the kernel kills as a whole (memory.oom.group); None: none."""
    never_killed: str | None = None
    """The cgroup in which the kernel kills nobody, but has them wait (v1's oom_kill_disable); None: none."""
    unit: Unit | None = None
    program: Program = Program()
    cpus: float | None = None
    """How many processors it may use."""
    guarded: bool = False
    """Whether oomsafe guards it."""
    reckoned: Reckoned | None = None
    """None also if it is guarded and its scoreboard can't be read: it is another user's, or another version's."""

    @property
    def about(self) -> str:
        """``pool shop (gunicorn, supervisor 812)``."""
        name = f" {self.name}" if self.name else ""
        return f"pool{name} ({self.server}{', supervisor' if self.workers else ''} {self.supervisor.pid})"

    @property
    def in_swap(self) -> int:
        """What of its processes is in swap."""
        return sum(process.swapped for process in (self.supervisor, *self.workers))

    @property
    def own_limit(self) -> Level | None:
        """The cgroup's level that leaves it least; None: nothing but the machine limits it."""
        return tightest([level for level in self.levels if level.source.kind is not Kind.MACHINE], 0)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All of it."""

    system: str
    """``Linux``, ``Darwin``, …"""
    kernel: str = ""
    container: Container = Container.NONE
    levels: tuple[Level, ...] = ()
    """Those of the process that asks."""
    cut_off: bool = False
    """Limits above the highest visible cgroup can't be seen."""
    swap: int | None = None
    swap_free: int | None = None
    settings: Settings = Settings()
    score: int | None = None
    """oom_score_adj of the container's first process, or of the process that asks."""
    raises_only: bool | None = None
    """Whether this user may not lower a score (no CAP_SYS_RESOURCE)."""
    kernel_log: bool | None = None
    """Whether the kernel's log can be read from here."""
    pressure: bool | None = None
    """Whether the kernel measures pressure (PSI)."""
    shm: int | None = None
    """The size of /dev/shm."""
    shm_used: int | None = None
    killers: tuple[str, ...] = ()
    """Programs that run here and kill when memory is short: earlyoom, systemd-oomd, …"""
    pools: tuple[Pool, ...] = ()
    unread: tuple[str, ...] = ()
    """What could not be looked at, in words."""
