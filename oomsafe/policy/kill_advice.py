"""An OOM event in sentences: why this process, what to do, and what is not what many articles say. Text from the log is made printable."""

from __future__ import annotations

from oomsafe.policy.oomlog.record import Killed
from oomsafe.policy.text import printable
from oomsafe.policy.units import counted, format_size
from oomsafe.policy.why_killed import Account, Holder, Outcome, Scope, kernel_is_before

#: From this share of the limit on, one process, or shared memory, is what it was about.
MOST, MUCH = 0.5, 0.2

#: Below this share of what all hold, a victim was small.
SMALL = 0.1


def reasons(account: Account) -> list[str]:
    """Why the kernel did what it did."""
    event, killed = account.event, account.event.killed
    if account.outcome is Outcome.PANIC:
        return [f"The kernel panicked in place of a kill: {printable(event.panic or '')}."]
    if account.outcome is Outcome.NONE_KILLABLE:
        return ["Nobody could be killed: every process here is exempt (oom_score_adj -1000), or is being killed already."]
    if killed is None:
        return ["The end of this report is not in the log: who was killed is not known."]
    if event.order == -1:
        return ["Somebody asked for this kill (SysRq-f); memory may have been plentiful."]
    if event.allocating_task:
        return [
            "The kernel did not choose: vm.oom_kill_allocating_task is set, so whoever asks for memory is killed, whatever its score. "
            "(Some articles say that it kills the highest score.)"
        ]
    return [*_selection(account, killed), *_counterfactual(account, killed), *_history(account, killed)]


def _selection(account: Account, killed: Killed) -> list[str]:
    if not account.event.has_table:
        return [
            "Who else held memory is not in the log: the kernel prints the table for ten reports in 5 s at most, and only if "
            "vm.oom_dump_tasks is 1."
        ]
    victim, first = account.victim, account.most_points
    if victim is None:
        return ["The killed process is not in the table." if account.holders else "The table's rows are not in the log."]
    if first is None:
        return ["The report of this kernel lacks figures to compute everybody's points."]
    others = len([holder for holder in account.holders if not holder.is_exempt])
    if first.pid == victim.pid or first.points == victim.points:
        only = "It was the only one that could be killed" if others == 1 else f"It had the most points of {others}"
        return [f"{only}: {_sum_of(victim, account)}."]
    if account.event.chosen_pid not in (None, killed.pid):
        return []
    unknown = ", and how much swap counts is not known" if account.total_is_least else ""
    return [
        f"By this table {_name(first)} had more points ({first.points}) than it ({victim.points}): the kernel passes over a process that "
        f"is being killed already, and the table is older than the choice{unknown}."
    ]


def _sum_of(holder: Holder, account: Account) -> str:
    """``716 MiB resident + 1.6 MiB page tables + 230 MiB for oom_score_adj 300 (300/1000 of 768 MiB)``."""
    parts = [f"{format_size(holder.rss)} resident"]
    parts += [f"{format_size(holder.swap)} in swap"] if holder.swap else []
    parts += [f"{format_size(holder.pgtables)} of page tables"]
    adj = holder.oom_score_adj
    if adj and account.total_pages is not None:
        total = account.total_pages * account.page_size
        sign, least = "+" if adj > 0 else "-", "at least " if account.total_is_least else ""
        share = f"{abs(adj)}/1000 of {least}{format_size(total)}"
        parts[-1] += (
            f" {sign} {format_size(abs(adj) * (account.total_pages // 1000) * account.page_size)} for its oom_score_adj of {adj} ({share})"
        )
    return f"{' + '.join(parts)} = {holder.points} pages"


def _counterfactual(account: Account, killed: Killed) -> list[str]:
    other, victim = account.without_scores, account.victim
    if other is None or victim is None or len(account.holders) < 2:
        return []
    if all(not holder.oom_score_adj for holder in account.holders):
        return ["No score changed that: every oom_score_adj is 0."]
    if other.pid == killed.pid:
        return ["Without any oom_score_adj it would have been chosen too."]
    ours = f" (a worker of oomsafe's, slot {other.slot})" if other.slot is not None else ""
    return [f"Without any oom_score_adj, {_name(other)}{ours} would have been chosen: it held {format_size(other.size)}."]


def _history(account: Account, killed: Killed) -> list[str]:
    """What older kernels do differently, where this event shows it."""
    event, said = account.event, []
    if event.chosen_pid not in (None, killed.pid) and event.constraint is None:
        chosen = f"{printable(event.chosen_comm or '', 32)} ({event.chosen_pid})"
        child = f"{printable(killed.comm, 32)} ({killed.pid})"
        said.append(f"The kernel selected {chosen}, and killed its child {child} in its place, as it did until Linux 5.0.")
    if event.rows and event.rows[0].oom_score_adj is None:
        said.append("This kernel is older than 2.6.36: it weighed run time and niceness too, which later kernels don't.")
    elif kernel_is_before(event, 4, 17) and any(holder.uid == 0 for holder in account.holders):
        said.append("Before Linux 4.17 a process with CAP_SYS_ADMIN had 3 % less points; that is not counted here.")
    return said


def advice(account: Account) -> list[str]:
    """What to do in this case, the most important first."""
    if account.outcome is Outcome.PANIC:
        return [
            "vm.panic_on_oom=0 makes the kernel kill a process instead. A memory limit for each service keeps the machine from running out."
        ]
    if account.outcome is Outcome.NONE_KILLABLE:
        return ["Leave -1000 to what must never die: a full cgroup in which everybody is exempt hangs."]
    if account.event.killed is None:
        return ["Look in the journal or in the syslog, which keep more than the kernel's ring buffer: oomsafe explain --journal."]
    found = [*_group(account), *_score(account), *_supervisor(account), *_memory(account), *_hidden(account)]
    return found or ["Read the whole log, not only this line: the journal or the syslog may have the table of who held what."]


def _group(account: Account) -> list[str]:
    if account.outcome is not Outcome.GROUP_KILLED:
        return []
    number = 1 + len(account.event.also_killed)
    died = "1 process" if number == 1 else f"{number} processes"
    return [
        f"memory.oom.group is set for {printable(account.event.group or '', 120)}: the whole cgroup dies ({died} here), and no score "
        "helps. Kubernetes sets it from 1.28 on; the kubelet's singleProcessOOMKill: true (1.32) turns it off. systemd: OOMPolicy=continue."
    ]


def _score(account: Account) -> list[str]:
    """A small process that was killed for its score."""
    victim, other, size = account.victim, account.without_scores, account.victim_size
    if victim is None or other is None or size is None or other.pid == victim.pid or (victim.oom_score_adj or 0) <= 0:
        return []
    if size >= SMALL * sum(holder.size for holder in account.holders):
        return []
    return [
        f"It was small ({format_size(size)}), and killed for its oom_score_adj of {victim.oom_score_adj}; the most memory is held by "
        f"{_name(other)} ({format_size(other.size)}). If it is not meant to be sacrificed for that, lower its score, or limit the other."
    ]


def _supervisor(account: Account) -> list[str]:
    """Whether it was a supervisor that died, so far as names can tell."""
    killed, workers = account.event.killed, [holder for holder in account.holders if holder.slot is not None]
    if killed is None or account.slot is not None or account.outcome is Outcome.GROUP_KILLED:
        return []
    if workers:
        return [
            f"{printable(killed.comm, 32)} ({killed.pid}) is none of the {counted(len(workers), 'workers')} that oomsafe guards here: it "
            "may be their supervisor, or something beside them. A supervisor that holds much (preload_app) has to fit in the limit beside "
            "its workers."
        ]
    family = [holder for holder in account.holders if holder.comm == killed.comm]
    if len(family) < 2 or killed.pid != min(holder.pid for holder in family):
        return []
    return [
        f"It may have been the supervisor: of {len(family)} processes named {printable(killed.comm, 32)} it has the lowest pid. Give its "
        "workers a higher oom_score_adj than their supervisor has, as oomsafe does, and the kernel takes a worker."
    ]


def _memory(account: Account) -> list[str]:
    """Who held it, and what follows from that."""
    limit, size, alike = account.limit, account.victim_size, account.alike()
    where = {Scope.CGROUP: "the cgroup's limit", Scope.MACHINE: "the machine's memory"}.get(account.scope, "the memory that was allowed")
    if len(alike) >= 3 and account.scope is not Scope.MACHINE:
        each = max(holder.size for holder in alike)
        needed = f" For {len(alike)} of them it must be {format_size(int(len(alike) * each / 0.9))} or more." if limit else ""
        return [
            f"{len(alike)} processes share the memory evenly, up to {format_size(each)} each: {where} is too small for so many. Run fewer, "
            f"recycle them sooner (oomsafe run --soft-limit), or raise it.{needed}"
        ]
    if account.scope is Scope.MACHINE:
        return _machine(account)
    if limit and size and size >= MOST * limit:
        return [
            f"One process held {size / limit:.0%} of {where}. If it grew over many requests, it leaks: recycle it sooner (oomsafe run "
            "--soft-limit). If one request or task did it, a hard limit refuses that one alone (--hard-limit)."
        ]
    if limit and size and account.is_whole and account.victim is not None and account.without_scores is account.victim:
        return [f"The biggest process held only {size / limit:.0%} of {where}; all together met it. Fewer processes, or a higher limit."]
    return []


def _machine(account: Account) -> list[str]:
    found = [
        "The whole machine ran out, and not a container's limit. Give each service one (systemd MemoryMax=, docker --memory, Kubernetes "
        "resources.limits), and a service that grows hurts only itself."
    ]
    other, killed = account.without_scores, account.event.killed
    if other is not None and killed is not None and other.pid != killed.pid:
        found.append(f"The most memory was held by {_name(other)}: {format_size(other.size)}.")
    return found


def _hidden(account: Account) -> list[str]:
    """Memory that is in no process's row."""
    event, limit, page = account.event, account.limit, account.page_size
    found = []
    shared = event.shmem if account.scope is Scope.CGROUP else event.shmem_pages * page if event.shmem_pages is not None else None
    if limit and shared and shared > MUCH * limit:
        found.append(f"{format_size(shared)} are shared memory and tmpfs (/dev/shm, an emptyDir in memory): no kill frees the files there.")
    if limit and event.slab_pages and event.slab_pages * page > MUCH * limit:
        found.append(f"{format_size(event.slab_pages * page)} are held by the kernel itself (unreclaimable slab): slabtop shows for what.")
    if limit and event.hugepages and event.hugepages > MUCH * limit:
        found.append(f"{format_size(event.hugepages)} are set apart as huge pages (vm.nr_hugepages), whether used or not.")
    if limit and event.kmem and event.kmem.usage > MUCH * limit:
        found.append(f"{format_size(event.kmem.usage)} are held by the kernel for this cgroup: sockets, open files, many small files.")
    if account.scope is Scope.CGROUP and event.order is not None and event.order > 3:
        found.append(f"{2**event.order} pages in a row were asked for.")
    return found


def _name(holder: Holder) -> str:
    return f"{printable(holder.comm, 32)} ({holder.pid})"
