"""Reads what `oomsafe doctor` knows: the machine, and each pool on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from oomsafe.cli.found_pools import servers
from oomsafe.kernel import host
from oomsafe.kernel.capacity import read_levels
from oomsafe.kernel.cgroup import find_cgroup
from oomsafe.kernel.cpus import cpus_of
from oomsafe.kernel.oom_candidates import candidate_of, candidates_of, field_of, total_of
from oomsafe.kernel.process import CAP_SYS_RESOURCE, PAGE, has_capability, userspace_killers
from oomsafe.kernel.program import program_of
from oomsafe.kernel.units import Show, show, unit_of
from oomsafe.policy.doctor.facts import Facts, Pool, Ranking, Reckoned
from oomsafe.policy.limits import Level, Source
from oomsafe.scoreboard.view import PoolView

NO_PROC = "this system has no /proc: limits, scores and who would be killed can't be read here"


def read_facts(
    views: Sequence[PoolView], unread: Collection[int] = (), *, root: str = "", ask: Show = show, environment: dict[str, str] | None = None
) -> Facts:
    """All of them. `views` are the pools that oomsafe guards; `unread` the supervisors of those whose scoreboard can't be read.

    `root`, `ask` and `environment` are those of a captured machine.
    """
    proc = f"{root}/proc"
    if not os.path.isdir(f"{proc}/self"):
        return Facts(system=platform.system(), unread=(NO_PROC,))
    cgroup = find_cgroup(proc=proc)
    swap, swap_free = host.swap_of(root)
    shm, shm_used = host.shm_of(root)
    levels = read_levels(proc)
    rankings: dict[Source, Ranking | None] = {}
    pools = [*_guarded(views, root, ask, rankings), *_found(views, unread, root, ask, rankings)]
    return Facts(
        system="Linux", kernel=host.release_of(root), container=host.container_of(root, environment), levels=levels,
        cut_off=cgroup is not None and cgroup.is_cut_off, swap=swap, swap_free=swap_free, settings=host.settings_of(root),
        score=host.first_score(root), raises_only=None if (lowers := has_capability(CAP_SYS_RESOURCE, proc)) is None else not lowers,
        kernel_log=host.can_read_kernel_log(root), pressure=host.measures_pressure(root), shm=shm, shm_used=shm_used,
        killers=tuple(userspace_killers(proc)), pools=tuple(pools), unread=tuple(_unread(levels, root)),
    )  # fmt: skip


def _unread(levels: Sequence[Level], root: str) -> Iterator[str]:
    for level in levels:
        for name in level.unread:
            yield f"{level.source.path}/{name} can't be read"
    if levels[-1].limit is None or levels[-1].used is None:
        yield f"{root}/proc/meminfo can't be read (systemd's ProcSubset=pid hides it)"
    if not os.path.isdir(f"{root}/proc/1"):
        yield "other users' processes are hidden (/proc with hidepid): only this user's pools can be seen"


def _guarded(views: Sequence[PoolView], root: str, ask: Show, rankings: dict[Source, Ranking | None]) -> Iterator[Pool]:
    for view in views:
        workers = [worker.pid for worker in view.workers if worker.pid != view.supervisor]
        figures = [worker.figures for worker in view.workers]
        known = Reckoned(
            wanted=view.workers_wanted, budget=view.budget, held=view.held, others=view.others, limit=view.limit,
            soft=min((each.soft for each in figures if each.soft is not None), default=None),
            fresh=max((each.baseline for each in figures if each.baseline is not None), default=None),
            biggest=max((worker.used for worker in view.workers if worker.used is not None), default=None),
        )  # fmt: skip
        found = _pool(view.server, view.supervisor, workers, root, ask, rankings, name=view.name, guarded=True, known=known)
        if found is not None:
            yield found


def _found(
    views: Sequence[PoolView], unread: Collection[int], root: str, ask: Show, rankings: dict[Source, Ranking | None]
) -> Iterator[Pool]:
    guarded = {pid for view in views for pid in (view.supervisor, *(worker.pid for worker in view.workers))}
    for server in servers(f"{root}/proc"):
        if server.supervisor in guarded or guarded.intersection(server.workers):
            continue
        found = _pool(server.name, server.supervisor, server.workers, root, ask, rankings, guarded=server.supervisor in unread)
        if found is not None:
            yield found


def _pool(
    server: str, pid: int, pids: Sequence[int], root: str, ask: Show, rankings: dict[Source, Ranking | None], *,
    name: str = "", guarded: bool = False, known: Reckoned | None = None,
) -> Pool | None:  # fmt: skip
    proc = f"{root}/proc"
    supervisor = candidate_of(pid, proc)
    if supervisor is None:  # it has ended meanwhile
        return None
    workers = tuple(candidates_of(pids, proc))
    # the scoreboard of another user's pool, or of another version's, can't be read, and its workers' names can
    guarded = guarded or any(worker.name.startswith("oomsafe-w") for worker in workers)
    cgroup, levels = find_cgroup(pid, proc), read_levels(proc, pid)
    pool = Pool(
        server=server, name=name, supervisor=supervisor, workers=workers, levels=levels,
        dies_whole=None if cgroup is None else cgroup.dies_whole(),
        never_killed=None if cgroup is None else cgroup.kills_nobody(),
        unit=None if cgroup is None else unit_of(cgroup, root, ask),
        program=program_of(pid, proc), cpus=cpus_of(pid, proc), guarded=guarded, reckoned=known,
    )  # fmt: skip
    where = [level for level in (pool.own_limit, levels[-1]) if level is not None]
    return replace(pool, rankings=tuple(found for level in where if (found := _ranking(level, proc, rankings)) is not None))


def _ranking(level: Level, proc: str, rankings: dict[Source, Ranking | None]) -> Ranking | None:
    """Read once for all pools below that level."""
    if level.source not in rankings:
        total = total_of(level, proc)
        field = None if total is None else field_of(level, proc)
        if total is None or field is None:
            rankings[level.source] = None
        else:
            rankings[level.source] = Ranking(level=level, total=total, candidates=field.candidates, unseen=field.unseen, page=PAGE)
    return rankings[level.source]
