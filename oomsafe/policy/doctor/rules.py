"""What is wrong with a machine for the pools on it, the worst first. Each rule is one function from facts to findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import wraps

from oomsafe.policy.boot_line import LITTLE
from oomsafe.policy.budget import CAN_HELP
from oomsafe.policy.doctor.facts import UNLIMITED, Container, Facts, Pool, Ranking, Unit
from oomsafe.policy.limits import Kind, tightest
from oomsafe.policy.readers import SCORE_MAX, SCORE_MIN
from oomsafe.policy.units import format_size
from oomsafe.policy.victims import Candidate

#: A pool that holds more than this share of its limit is near it.
NEAR = 0.9

#: Memory in swap from this share of what the pool's processes hold hides how much they grow.
SWAPPED = 0.1

#: More workers than this for each processor wait for each other, and each holds memory.
WORKERS_PER_CPU = 8

SHM = "/dev/shm"  # noqa: S108  nothing is written there

#: It needs this much for scoreboards, and for the files that gunicorn's workers touch.
SHM_LEAST = 4 << 20

#: Files in /dev/shm from this share of the limit on are worth a line: they are charged like memory.
SHM_SHARE = 0.1

#: A unit that has more than this share of the tasks that it may have can't start many more workers.
TASKS = 0.8

#: What a pod's container needs.
REQUESTS = "resources: {requests: {memory: 512Mi}, limits: {memory: 512Mi}}  # with your own size: oomsafe advise"


class Severity(Enum):
    """What would happen if nothing is changed."""

    DANGER = "danger"
    """Memory that ends takes the whole service down."""
    WARNING = "warning"
    """It costs work, or a worker, more often than it has to."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to change."""

    code: str
    """Its name, and its heading in docs/doctor.md."""
    severity: Severity
    about: str
    """What it is about: a pool, a unit, the machine."""
    fact: str
    why: str
    change: tuple[str, ...]
    """The lines to write or to run; of several, each does."""


Rule = Callable[[Facts], Iterator[Finding]]

THE_MACHINE = "this machine"


def each_pool(rule: Callable[[Pool, Facts], Iterator[Finding]]) -> Rule:
    """A rule about one pool, as one about all of them."""

    @wraps(rule)
    def rule_of_all(facts: Facts) -> Iterator[Finding]:
        for pool in facts.pools:
            yield from rule(pool, facts)

    return rule_of_all


def findings_of(facts: Facts) -> list[Finding]:
    """Everything to change, what would hurt first before the rest."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: finding.severity is not Severity.DANGER)


# --- the whole service goes -------------------------------------------------------------------------------------------------------


def panic(facts: Facts) -> Iterator[Finding]:
    """vm.panic_on_oom."""
    value = facts.settings.panic_on_oom
    if value:
        when = "also when a cgroup reaches its limit" if value == 2 else "when the machine's memory ends"
        yield Finding(
            code="panic-on-oom", severity=Severity.DANGER, about=THE_MACHINE,
            fact=f"vm.panic_on_oom is {value}",
            why=f"the kernel panics {when}, and kills no worker: everything on the machine is gone",
            change=_sysctl("vm.panic_on_oom", 0),
        )  # fmt: skip


@each_pool
def whole_cgroup(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """memory.oom.group, on a pool's cgroup or above it."""
    if pool.dies_whole is not None:
        yield Finding(
            code="dies-whole", severity=Severity.DANGER, about=pool.about,
            fact=f"memory.oom.group is 1 in {pool.dies_whole}",
            why="when the limit is reached the kernel kills every process in there, the supervisor too, not one worker",
            change=_one_process(pool, facts),
        )  # fmt: skip


def _one_process(pool: Pool, facts: Facts) -> tuple[str, ...]:
    if facts.container is Container.KUBERNETES:
        return ("kubelet configuration (KubeletConfiguration, Kubernetes 1.32): singleProcessOOMKill: true",)
    if pool.unit is not None:
        return _unit(pool.unit, "OOMPolicy=continue")
    return (f"echo 0 > {pool.dies_whole}/memory.oom.group",)


@each_pool
def unit_stops(pool: Pool, _: Facts) -> Iterator[Finding]:
    """OOMPolicy=stop, which is systemd's default, or kill."""
    unit = pool.unit
    if unit is not None and unit.oom_policy in ("stop", "kill"):
        done = "stops the whole service" if unit.oom_policy == "stop" else "has the kernel kill the whole service"
        yield Finding(
            code="unit-stops", severity=Severity.DANGER, about=f"{pool.about}, {unit.name}",
            fact=f"OOMPolicy={unit.oom_policy}{' (the default)' if unit.oom_policy == 'stop' else ''}",
            why=f"systemd {done} as soon as the kernel has killed one of its workers",
            change=_unit(unit, "OOMPolicy=continue"),
        )  # fmt: skip


@each_pool
def nobody_killed(pool: Pool, _: Facts) -> Iterator[Finding]:
    """v1's memory.oom_control."""
    if pool.never_killed is not None:
        yield Finding(
            code="nobody-is-killed", severity=Severity.DANGER, about=pool.about,
            fact=f"oom_kill_disable is 1 in {pool.never_killed}/memory.oom_control",
            why="at the limit the kernel kills nobody: whoever asks for memory waits for ever, and the service hangs",
            change=(f"echo 0 > {pool.never_killed}/memory.oom_control", "docker run without --oom-kill-disable"),
        )  # fmt: skip


@each_pool
def supervisor_first(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """A supervisor that the kernel would take before one of its workers."""
    worst = min(
        ((margin, ranking) for ranking in pool.rankings if (margin := ranking.margin(pool.supervisor, pool.workers)) is not None),
        key=lambda pair: pair[0],
        default=None,
    )
    if worst is None or worst[0] > 0:
        return
    margin, ranking = worst
    own = pool.supervisor
    lowest = min(pool.workers, key=lambda worker: worker.points(ranking.total, ranking.page))
    exempt = lowest.oom_score_adj <= SCORE_MIN
    yield Finding(
        code="supervisor-first", severity=Severity.DANGER, about=pool.about,
        fact=f"supervisor {own.pid} has {_points(own, ranking)}, its worker {lowest.pid} "
        + ("may not be killed at all (oom_score_adj -1000)" if exempt else f"only {_points(lowest, ranking)}")
        + f", of {format_size(ranking.total)} ({ranking.level.source})",
        why="the kernel kills the process with the most points: it may take the supervisor, and with it the whole service",
        change=_raise_workers(pool, facts),
    )  # fmt: skip


def _raise_workers(pool: Pool, facts: Facts) -> tuple[str, ...]:
    if pool.supervisor.oom_score_adj > SCORE_MAX - 100:
        return (
            REQUESTS if facts.container is Container.KUBERNETES else "start the supervisor with a lower oom_score_adj than "
            f"{pool.supervisor.oom_score_adj}, so that its workers can be above it",
        )  # fmt: skip
    if not pool.guarded:
        return ("oomsafe run -- (before the command that starts it)",)
    return ('worker_oom_score_adj = "auto"', "OOMSAFE_WORKER_OOM_SCORE_ADJ=auto")


@each_pool
def all_exempt(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A pool whose processes may all not be killed."""
    if pool.workers and all(process.oom_score_adj <= SCORE_MIN for process in (pool.supervisor, *pool.workers)):
        yield Finding(
            code="nobody-may-be-killed", severity=Severity.DANGER, about=pool.about,
            fact="oom_score_adj is -1000 for the supervisor and for every worker",
            why="in its own cgroup the kernel finds nobody to kill, and has whoever asks for memory wait; outside it kills others",
            change=(*_unit(pool.unit, "OOMScoreAdjust=-500"),) if pool.unit else ("oom_score_adj of -500 where it is started",),
        )  # fmt: skip


def best_effort(facts: Facts) -> Iterator[Finding]:
    """A pod without requests and limits: the first to go on its node."""
    if facts.container is Container.KUBERNETES and facts.score == SCORE_MAX:
        yield Finding(
            code="best-effort", severity=Severity.DANGER, about="this pod",
            fact="its oom_score_adj is 1000: its QoS class is BestEffort",
            why="when the node's memory ends it is the first to be killed; and as nothing is above 1000, its workers can't be put before "
            "their supervisor",
            change=(REQUESTS,),
        )  # fmt: skip


def allocating_task(facts: Facts) -> Iterator[Finding]:
    """vm.oom_kill_allocating_task."""
    if facts.settings.oom_kill_allocating_task:
        yield Finding(
            code="kills-who-asks", severity=Severity.DANGER, about=THE_MACHINE,
            fact="vm.oom_kill_allocating_task is 1",
            why="when the machine's memory ends the kernel kills whoever asks for some at that moment, whatever the scores: a supervisor, "
            "a database, sshd",
            change=_sysctl("vm.oom_kill_allocating_task", 0),
        )  # fmt: skip


@each_pool
def killed_for_pressure(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """systemd-oomd, where it may kill the pool's unit."""
    unit = pool.unit
    if unit is not None and unit.killed_for_pressure and "systemd-oomd" in facts.killers and unit.preference != "omit":
        yield Finding(
            code="oomd-kills-the-unit", severity=Severity.DANGER, about=f"{pool.about}, {unit.name}",
            fact="systemd-oomd runs, and may kill this unit (ManagedOOMMemoryPressure= or ManagedOOMSwap= is kill)",
            why="it kills all processes of a cgroup at once, the supervisor too, and looks at no score",
            change=_unit(unit, "ManagedOOMPreference=omit"),
        )  # fmt: skip


@each_pool
def fresh_do_not_fit(pool: Pool, _: Facts) -> Iterator[Finding]:
    """More workers than memory, even right after boot."""
    known = pool.reckoned
    if known is None or known.fresh is None or known.limit is None:
        return
    room = known.limit - (known.others or 0)
    need = pool.supervisor.held + known.wanted * known.fresh
    if known.budget is not None and known.wanted * known.fresh > room:
        fit = max(1, (known.budget - pool.supervisor.held) // max(1, known.fresh))
        yield Finding(
            code="workers-do-not-fit", severity=Severity.DANGER, about=pool.about,
            fact=f"{known.wanted} workers of {format_size(known.fresh)} right after boot and the supervisor hold {format_size(need)}, "
            f"and there are {format_size(room)}",
            why="the kernel kills workers however often they are recycled",
            change=(f"--workers {fit}", f"a limit of {format_size(int(need / NEAR))} or more"),
        )  # fmt: skip


# --- it hurts -----------------------------------------------------------------------------------------------------------------------


@each_pool
def near_the_limit(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A pool that is about to meet a limit, and is not guarded."""
    level = pool.own_limit
    if level is None or level.effective is None or level.used is None or pool.guarded:
        return
    in_use = level.used - level.droppable
    if in_use > NEAR * level.effective:
        yield Finding(
            code="near-the-limit", severity=Severity.WARNING, about=pool.about,
            fact=f"{format_size(in_use)} of {format_size(level.effective)} are in use, without the cache that can be dropped "
            f"({level.bound_by})",
            why="the next request that needs memory has the kernel kill a process",
            change=("oomsafe run -- (before the command that starts it), which recycles workers before that", "oomsafe advise"),
        )  # fmt: skip


@each_pool
def budget_too_low(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A budget that fresh workers alone fill."""
    known = pool.reckoned
    if known is None or known.fresh is None or known.budget is None:
        return
    need, room = known.wanted * known.fresh, (known.limit or 0) - (known.others or 0)
    if CAN_HELP * known.budget < need <= room:
        yield Finding(
            code="budget-too-low", severity=Severity.WARNING, about=pool.about,
            fact=f"{known.wanted} workers hold {format_size(need)} right after boot, the budget is {format_size(known.budget)}",
            why="recycling can't bring the pool below its budget, and is not tried: the kernel's limit is the next thing that it meets",
            change=(f"--workers {max(1, known.wanted - 1)}", "a higher limit for the pool: oomsafe advise"),
        )  # fmt: skip


@each_pool
def soft_limit_too_low(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A soft limit that a fresh worker has nearly reached."""
    known = pool.reckoned
    if known is None or known.soft is None or known.fresh is None or known.soft - known.fresh >= known.soft * LITTLE:
        return
    yield Finding(
        code="soft-limit-too-low", severity=Severity.WARNING, about=pool.about,
        fact=f"workers hold {format_size(known.fresh)} right after boot, the soft limit is {format_size(known.soft)}",
        why="a limit that a fresh worker has nearly reached is refused, or has workers recycled all the time",
        change=(f"--workers {max(1, known.wanted - 1)}", "a higher limit for the pool: oomsafe advise"),
    )  # fmt: skip


@each_pool
def no_room_for_a_replacement(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A pool in which a worker must leave before its replacement can boot."""
    known = pool.reckoned
    if known is None or known.fresh is None or known.limit is None or known.held is None or known.held > (known.budget or known.held):
        return
    left = known.limit - (known.others or 0) - known.held
    if 0 <= left < known.fresh:
        yield Finding(
            code="no-room-for-a-replacement", severity=Severity.WARNING, about=pool.about,
            fact=f"{format_size(left)} are left up to the limit, a fresh worker holds {format_size(known.fresh)}",
            why="a worker that is recycled leaves before its replacement is there: for as long as one boots, a worker is missing",
            change=(f"--workers {max(1, known.wanted - 1)}", "a higher limit for the pool: oomsafe advise"),
        )  # fmt: skip


@each_pool
def too_many_workers(pool: Pool, _: Facts) -> Iterator[Finding]:
    """Workers by the dozen for each processor, in limited memory."""
    level = tightest(pool.levels, 0)
    if pool.cpus is None or level is None or level.effective is None or len(pool.workers) <= WORKERS_PER_CPU * pool.cpus:
        return
    held = sum(worker.held for worker in pool.workers)
    if held > level.effective / 4:
        few = max(2, round(2 * pool.cpus) + 1)
        yield Finding(
            code="too-many-workers", severity=Severity.WARNING, about=pool.about,
            fact=f"{len(pool.workers)} workers on {pool.cpus:g} processors, {format_size(held // len(pool.workers))} each, "
            f"of {format_size(level.effective)}",
            why="they wait for each other, and each holds memory of its own; servers guess their number by the machine's processors, "
            "not by the container's",
            change=(f"--workers {few}, with threads for what waits (--threads 4)", "oomsafe advise"),
        )  # fmt: skip


@each_pool
def another_first(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """A process in the pool's own cgroup that the kernel takes before any worker."""
    ranking = next(iter(pool.rankings), None)
    if ranking is None or ranking.level.source.kind is Kind.MACHINE:
        return
    first = next(iter(ranking.order), None)
    ours = {process.pid for other in facts.pools for process in (other.supervisor, *other.workers)}
    if first is not None and first.pid not in ours:
        yield Finding(
            code="another-goes-first", severity=Severity.WARNING, about=pool.about,
            fact=f"{first.name} ({first.pid}) in the same cgroup has {_points(first, ranking)}, more than any worker "
            f"({ranking.level.source})",
            why="when that limit is reached the kernel kills it, and not the worker that has grown",
            change=(f"a cgroup, container or unit of its own for {first.name}", f"choom -p {first.pid} -n <lower oom_score_adj>"),
        )  # fmt: skip


@each_pool
def no_limit(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """A pool that nothing but the machine's memory stops."""
    if not pool.levels or pool.own_limit is not None or any(level.unread for level in pool.levels) or facts.cut_off:
        return
    machine = pool.levels[-1].limit
    yield Finding(
        code="no-limit", severity=Severity.WARNING, about=pool.about,
        fact=f"no cgroup limits it: it may take all of the machine's {format_size(machine)}",
        why="if it leaks, the whole machine runs out of memory, and the kernel chooses among all processes, sshd and databases too",
        change=_limit_it(pool, facts, machine),
    )  # fmt: skip


def _limit_it(pool: Pool, facts: Facts, machine: int | None) -> tuple[str, ...]:
    size = None if machine is None else f"{max(1, machine * 3 // 4 >> 20)}M"
    if facts.container is Container.KUBERNETES:
        return (REQUESTS,)
    if facts.container in (Container.DOCKER, Container.PODMAN):
        return (f"{facts.container.value.lower()} run --memory {size or '1g'} --memory-swap {size or '1g'} …",)
    if pool.unit is not None:
        return _unit(pool.unit, f"MemoryMax={size or '75%'}")
    return (f"systemd-run --scope -p MemoryMax={size or '75%'} -p OOMPolicy=continue <the command that starts it>",)


@each_pool
def throttled(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A pool at its memory.high."""
    for level in pool.levels:
        if level.high is None or level.usage is None or level.high != level.effective or level.usage < level.high * NEAR:
            continue
        yield Finding(
            code="throttled", severity=Severity.WARNING, about=pool.about,
            fact=f"{format_size(level.usage)} are in use, memory.high is {format_size(level.high)} ({level.source.path})",
            why="above memory.high the kernel slows every process down, long before it kills one: work times out, and nobody sees why",
            change=_unit(pool.unit, "MemoryHigh=infinity") if pool.unit else (f"echo max > {level.source.path}/memory.high",),
        )  # fmt: skip
        return


@each_pool
def in_swap(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """A pool that grows into swap."""
    held = sum(process.held for process in (pool.supervisor, *pool.workers))
    if pool.in_swap and pool.in_swap > held * SWAPPED:
        yield Finding(
            code="in-swap", severity=Severity.WARNING, about=pool.about,
            fact=f"{format_size(pool.in_swap)} of the {format_size(held)} of its processes are in swap",
            why="limits on resident memory don't see what was swapped out: a leak shows as slowness, and not as growth",
            change=_no_swap(pool, facts),
        )  # fmt: skip


def _no_swap(pool: Pool, facts: Facts) -> tuple[str, ...]:
    if pool.unit is not None:
        return _unit(pool.unit, "MemorySwapMax=0")
    if facts.container in (Container.DOCKER, Container.PODMAN):
        return ("--memory-swap of the same size as --memory",)
    return _sysctl("vm.swappiness", 1)


@each_pool
def reuse_port(pool: Pool, facts: Facts) -> Iterator[Finding]:
    """--reuse-port, with which a worker that leaves drops what is queued at its own listener."""
    if pool.program.reuse_port and facts.settings.migrates_requests is False:
        yield Finding(
            code="reuse-port", severity=Severity.WARNING, about=pool.about,
            fact="--reuse-port is on, and net.ipv4.tcp_migrate_req is 0",
            why="connections that wait at the listener of a worker that leaves are reset",
            change=("without --reuse-port (workers then share one listener)", *_sysctl("net.ipv4.tcp_migrate_req", 1)),
        )  # fmt: skip


def strict_overcommit(facts: Facts) -> Iterator[Finding]:
    """vm.overcommit_memory=2."""
    if facts.settings.overcommit_memory == 2 and facts.pools:
        yield Finding(
            code="strict-overcommit", severity=Severity.WARNING, about=THE_MACHINE,
            fact="vm.overcommit_memory is 2",
            why="allocations, and forks of a large supervisor, fail while memory is still free: workers die of MemoryError, not of a kill",
            change=_sysctl("vm.overcommit_memory", 0),
        )  # fmt: skip


@each_pool
def address_space(pool: Pool, _: Facts) -> Iterator[Finding]:
    """RLIMIT_AS, which counts addresses and not memory."""
    limit = pool.program.limit_address_space
    if limit is not None and limit != UNLIMITED:
        yield Finding(
            code="address-space", severity=Severity.WARNING, about=pool.about,
            fact=f"its processes may map {format_size(limit)} (RLIMIT_AS)",
            why="it counts addresses that were never touched, like threads' stacks and malloc's arenas: memory is refused that is free",
            change=_unit(pool.unit, "LimitAS=infinity") if pool.unit is not None else ("ulimit -v unlimited, before it is started",),
        )  # fmt: skip


@each_pool
def data_limit(pool: Pool, _: Facts) -> Iterator[Finding]:
    """RLIMIT_DATA, where it is not oomsafe that has set it."""
    limit = pool.program.limit_data
    if limit is not None and limit != UNLIMITED:
        yield Finding(
            code="data-limit", severity=Severity.WARNING, about=pool.about,
            fact=f"each of its processes may have {format_size(limit)} of private writable memory (RLIMIT_DATA)",
            why="it counts what is mapped, touched or not; above it memory is refused, and a hard_limit that is higher has no effect",
            change=_unit(pool.unit, "LimitDATA=infinity") if pool.unit is not None else ("ulimit -d unlimited, before it is started",),
        )  # fmt: skip


@each_pool
def few_tasks(pool: Pool, _: Facts) -> Iterator[Finding]:
    """A unit with hardly room for another worker."""
    unit = pool.unit
    if unit is None or unit.tasks_max is None or unit.tasks_current is None or unit.tasks_current <= TASKS * unit.tasks_max:
        return
    yield Finding(
        code="few-tasks", severity=Severity.WARNING, about=f"{pool.about}, {unit.name}",
        fact=f"{unit.tasks_current} of {unit.tasks_max} tasks are in use (TasksMax=)",
        why="a replacement, or a thread, that can't be started looks like memory that has ended",
        change=_unit(unit, f"TasksMax={unit.tasks_max * 2}"),
    )  # fmt: skip


def shared_memory(facts: Facts) -> Iterator[Finding]:
    """A /dev/shm that is too small, or that holds what is charged to the limit."""
    if facts.shm is None or facts.shm_used is None or not facts.pools:
        return
    level = min((level for level in facts.levels if level.effective is not None), key=lambda level: level.effective or 0, default=None)
    docker = facts.container in (Container.DOCKER, Container.PODMAN)
    if facts.shm - facts.shm_used < SHM_LEAST:
        yield Finding(
            code="shm-is-full", severity=Severity.WARNING, about=THE_MACHINE,
            fact=f"{SHM} has {format_size(facts.shm)}, of which {format_size(facts.shm_used)} are used",
            why="scoreboards, servers' heartbeat files and multiprocessing's locks lie there; a write that finds no room is a bus error",
            change=("--shm-size 256m",) if docker else (f"mount -o remount,size=256M {SHM}", "rm (what is left over there)"),
        )  # fmt: skip
    elif level is not None and level.effective is not None and facts.shm_used > SHM_SHARE * level.effective:
        yield Finding(
            code="shm-is-charged", severity=Severity.WARNING, about=THE_MACHINE,
            fact=f"files in {SHM} hold {format_size(facts.shm_used)}, the limit is {format_size(level.effective)} ({level.bound_by})",
            why="they are memory, and charged to whoever wrote them: the pool has that much less, and no worker's size shows it",
            change=(f"rm (what is left over in {SHM})", "a folder on disk for them"),
        )  # fmt: skip


RULES: tuple[Rule, ...] = (
    panic, whole_cgroup, unit_stops, nobody_killed, supervisor_first, best_effort, all_exempt, allocating_task, killed_for_pressure,
    fresh_do_not_fit, near_the_limit, budget_too_low, soft_limit_too_low, no_room_for_a_replacement, too_many_workers, another_first,
    no_limit, throttled, in_swap, reuse_port, strict_overcommit, address_space, data_limit, few_tasks, shared_memory,
)  # fmt: skip


def _points(process: Candidate, ranking: Ranking) -> str:
    points = process.points(ranking.total, ranking.page)
    return f"{format_size(int(points))} of points" if points > float("-inf") else "none"


def _sysctl(name: str, value: int) -> tuple[str, ...]:
    return (f"sysctl -w {name}={value}   # and {name} = {value} in /etc/sysctl.d/90-oom.conf",)


def _unit(unit: Unit | None, line: str) -> tuple[str, ...]:
    assert unit is not None
    return (f"systemctl edit {unit.name}   # [Service] {line}",)
