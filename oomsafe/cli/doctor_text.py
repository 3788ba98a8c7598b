"""What the doctor found, as text in lines of a given width: what to change, the worst first, then what is here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from oomsafe.cli.labelled import LABEL, NARROWEST, labelled, wrapped
from oomsafe.policy.doctor.facts import Container, Facts, Pool, Program, Ranking, Reckoned
from oomsafe.policy.doctor.rules import SHM, Finding, Severity
from oomsafe.policy.limits import Kind, Level
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import counted, format_size
from oomsafe.policy.victims import Candidate

#: The cells of a label in the second part.
WIDE = 16

#: How many processes are named in the order in which the kernel takes them.
NAMED = 3

STYLES = {Severity.DANGER: "bold red", Severity.WARNING: "bold yellow"}


def doctor_text(facts: Facts, findings: Sequence[Finding], width: int) -> Text:
    """All of it. A line to copy is never broken; what other processes have written is made printable."""
    width = max(NARROWEST, width)
    lines = [Text(line, style="bold") for line in wrapped(_summary(facts, findings), width)]
    for alike in _alike(findings):
        lines += [Text(), *_finding(alike, width)]
    lines += [Text(), Text("What is here", style="bold")]
    for label, text in _facts(facts):
        lines += labelled(label, without_controls(text), width, indent=WIDE)
    return Text("\n").join(lines)


def _summary(facts: Facts, findings: Sequence[Finding]) -> str:
    pools = counted(len(facts.pools), "pools")
    if not findings:
        return f"oomsafe doctor: nothing to change ({pools})"
    dangers = sum(finding.severity is Severity.DANGER for finding in findings)
    hurts = len(findings) - dangers
    parts = [f"{dangers} would take a service down"] * bool(dangers) + [f"{hurts} would hurt one"] * bool(hurts)
    return f"oomsafe doctor: {', '.join(parts)} ({pools})"


def _alike(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Those that say the same of several pools together, in the order of the first of them."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.why, finding.change), []).append(finding)
    return list(groups.values())


def _finding(alike: Sequence[Finding], width: int) -> Iterator[Text]:
    first = alike[0]
    for number, finding in enumerate(alike):
        # the names of pools, and of processes, were chosen by others
        head = f"{finding.severity.value.upper() if not number else 'and'}: {without_controls(finding.about)}"
        yield from (Text(line, style=STYLES[finding.severity]) for line in wrapped(head, width))
        if finding is alike[-1] or finding.fact != alike[number + 1].fact:
            yield from labelled("fact", without_controls(finding.fact), width)
    yield from labelled("why", first.why, width)
    for number, line in enumerate(first.change):
        yield Text.assemble((f"{'or' if number else 'change':{LABEL}}", "bold"), (without_controls(line), "green"))
    yield from labelled("more", f"docs/doctor.md#{first.code}", width)


def _facts(facts: Facts) -> Iterator[tuple[str, str]]:
    system = " ".join(filter(None, (facts.system, facts.kernel)))
    yield "system", f"{system}{'' if facts.container is Container.NONE else f', {facts.container.value}'}"
    for number, level in enumerate(facts.levels):
        yield "" if number else "limits here", _level(level)
    if facts.cut_off:
        yield "", "limits above the container's own can't be seen from inside"
    if facts.system == "Linux":
        yield "swap", _swap(facts)
        yield "kernel", _kernel(facts)
        yield (
            "kernel log",
            "can be read" if facts.kernel_log else "can't be read: how a worker died is then 'likely' at best, not confirmed",
        )
        yield "pressure (PSI)", "measured" if facts.pressure else "not measured"
        yield "scores", _scores(facts)
    if facts.shm is not None:
        yield "shared memory", f"{SHM} has {format_size(facts.shm)}, {format_size(facts.shm_used)} are used"
    if facts.killers:
        yield "other killers", f"{', '.join(facts.killers)}: what they kill is not in the kernel's log"
    yield from (line for pool in facts.pools for line in _pool(pool))
    yield from _orders(facts)
    if facts.system == "Linux" and not facts.pools:
        yield "pools", "none of this user's" if facts.raises_only else "none"
    for line in facts.unread:
        yield "not known", line


def _level(level: Level) -> str:
    limit = "no limit" if level.limit is None else format_size(level.limit)
    high = "" if level.high is None else f", memory.high {format_size(level.high)}"
    used = "" if level.used is None else f", {format_size(level.used)} in use"
    return f"{limit}{high}{used} ({level.source})"


def _swap(facts: Facts) -> str:
    if not facts.swap:
        return "not known" if facts.swap is None else "none"
    return f"{format_size(facts.swap)}, {format_size(facts.swap_free)} free; vm.swappiness {_or_unknown(facts.settings.swappiness)}"


def _kernel(facts: Facts) -> str:
    known = facts.settings
    values = {
        "vm.panic_on_oom": known.panic_on_oom,
        "vm.oom_kill_allocating_task": known.oom_kill_allocating_task,
        "vm.overcommit_memory": known.overcommit_memory,
        "transparent huge pages": known.huge_pages,
    }
    return ", ".join(f"{name} {_or_unknown(value)}" for name, value in values.items())


def _or_unknown(value: object) -> str:
    return "not known" if value is None else str(value)


def _scores(facts: Facts) -> str:
    first = f"the first process has {_or_unknown(facts.score)}"
    if facts.container is Container.KUBERNETES and facts.score is not None:
        kind = "Guaranteed" if facts.score < 0 else "BestEffort" if facts.score >= 1000 else "Burstable"
        first += f" (QoS class {kind})"
    may = {True: "may only raise them", False: "may lower them (CAP_SYS_RESOURCE)", None: ""}[facts.raises_only]
    return f"{first}; this user {may}" if may else first


def _pool(pool: Pool) -> Iterator[tuple[str, str]]:
    name = f"{pool.name}: " if pool.name else ""
    guard = "guarded by oomsafe" if pool.guarded else "NOT guarded by oomsafe"
    version = ", whose scoreboard can't be read from here" if pool.guarded and pool.reckoned is None else ""
    who = f"supervisor {pool.supervisor.pid}, {counted(len(pool.workers), 'workers')}" if pool.workers else str(pool.supervisor.pid)
    yield "pool", f"{name}{pool.server}, {who}, {guard}{version}"
    if pool.unit is not None:
        yield "", f"unit {pool.unit.name}: OOMPolicy={pool.unit.oom_policy}, MemoryMax={pool.unit.memory_max}"
    yield "", _sizes(pool)
    if pool.reckoned is not None:
        yield "", _reckoned(pool.reckoned)
    yield "", _program(pool.program)
    for ranking in pool.rankings:
        yield "", _safety(pool, ranking)


def _sizes(pool: Pool) -> str:
    """What holds most, as the kernel counts it."""
    if not pool.workers:
        return f"it holds {format_size(pool.supervisor.held)}"
    sizes = sorted(worker.held for worker in pool.workers)
    biggest = max(pool.workers, key=lambda worker: worker.held)
    least, most = format_size(sizes[0]), format_size(sizes[-1])
    each = least if least == most else f"{least} to {most}"
    return f"the supervisor holds {format_size(pool.supervisor.held)}, a worker {each}, most of all worker {biggest.pid}"


def _reckoned(known: Reckoned) -> str:
    """Its limits against what it needs."""
    fresh = f"{known.wanted} fresh workers of {format_size(known.fresh)}, " if known.fresh is not None else ""
    soft = "none" if known.soft is None else format_size(known.soft)
    budget, limit = format_size(known.budget), format_size(known.limit)
    return f"{fresh}soft limit {soft}; the pool holds {format_size(known.held)}, budget {budget} of {limit}"


def _program(program: Program) -> str:
    free = " (free-threaded)" if program.free_threaded else ""
    parts = [
        f"Python {program.python}{free}" if program.python else "Python not known",
        f"malloc of {program.malloc}" if program.malloc else "malloc not known",
        *(f"{name}={value}" for name, value in program.environment.items()),
    ]
    return ", ".join(parts)


def _safety(pool: Pool, ranking: Ranking) -> str:
    """``in the 512 MiB of its cgroup the supervisor ranks 185 MiB below every worker: it is number 6 of 6``."""
    where = "on this machine" if ranking.level.source.kind is Kind.MACHINE else f"in the {format_size(ranking.level.limit)} of its cgroup"
    order, margin = ranking.order, ranking.margin(pool.supervisor, pool.workers)
    place = f": number {order.index(pool.supervisor) + 1} of {len(order)}" if pool.supervisor in order else ""
    if margin is None:
        return f"{where} it is {place.removeprefix(': ')}" if place else f"{where} it is never killed"
    if margin == float("inf"):
        return f"{where} the supervisor is never killed"
    if margin == float("-inf"):
        return f"{where} a worker may never be killed, and the SUPERVISOR may{place}"
    size = format_size(int(abs(margin)))
    if margin > 0:
        return f"{where} the supervisor ranks {size} below every worker{place}"
    return f"{where} the SUPERVISOR ranks {size} above the lowest worker{place}"


def _orders(facts: Facts) -> Iterator[tuple[str, str]]:
    """Whom the kernel takes, once for each level."""
    whose = {process.pid: "worker" for pool in facts.pools for process in pool.workers}
    whose |= {pool.supervisor.pid: "SUPERVISOR" for pool in facts.pools}
    seen = set()
    for ranking in (ranking for pool in facts.pools for ranking in pool.rankings):
        if ranking.level.source in seen:
            continue
        seen.add(ranking.level.source)
        where = "on this machine" if ranking.level.source.kind is Kind.MACHINE else f"in {ranking.level.source}"
        among = ", among those that can be seen from here" if ranking.unseen else ""
        first = [f"{_named(process, whose)} ({_points(process, ranking)})" for process in ranking.order[:NAMED]]
        yield "killed first", f"{where}: {', then '.join(first) or 'nobody'}{among}"


def _named(process: Candidate, whose: dict[int, str]) -> str:
    what = whose.get(process.pid)
    return f"{process.name} {process.pid}" if what is None else f"{what} {process.pid}"


def _points(process: Candidate, ranking: Ranking) -> str:
    return f"{format_size(int(process.points(ranking.total, ranking.page)))} of points, score {process.oom_score_adj}"
