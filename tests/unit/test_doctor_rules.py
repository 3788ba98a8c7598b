"""The doctor's rules: a well-set machine has no findings, and each thing that is wrong has exactly its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomsafe.policy.doctor.facts import UNLIMITED, Container, Facts, Pool, Program, Ranking, Reckoned, Settings, Unit
from oomsafe.policy.doctor.rules import RULES, Severity, findings_of
from oomsafe.policy.limits import MACHINE, Kind, Level, Source
from oomsafe.policy.victims import Candidate

MIB, GIB = 1 << 20, 1 << 30

SHOP = "/sys/fs/cgroup/system.slice/shop.service"
LEVEL = Level(Source(Kind.CGROUP, SHOP, 2), 512 * MIB, used=200 * MIB, usage=220 * MIB)
TOP = Level(MACHINE, 8 * GIB, used=2 * GIB, usage=3 * GIB)


def process(pid: int, held: int, score: int, name: str = "python") -> Candidate:
    """A process, its size in MiB."""
    return Candidate(pid=pid, name=name, held=held * MIB, oom_score_adj=score)


SUPERVISOR, WORKERS = process(10, 30, 0), (process(11, 60, 300), process(12, 60, 300))


def ranked(level: Level, *more: Candidate, of: tuple[Candidate, ...] = (SUPERVISOR, *WORKERS)) -> Ranking:
    """Whom the kernel takes there."""
    return Ranking(level=level, total=level.limit or 0, candidates=(*of, *more))


POOL = Pool(
    server="gunicorn sync", name="shop", supervisor=SUPERVISOR, workers=WORKERS, levels=(LEVEL, TOP),
    rankings=(ranked(LEVEL), ranked(TOP)),
    unit=Unit(name="shop.service", oom_policy="continue", memory_max="536870912", tasks_current=20, tasks_max=4000),
    program=Program(python="3.12", malloc="glibc", limit_data=UNLIMITED, limit_address_space=UNLIMITED),
    cpus=2, guarded=True,
    reckoned=Reckoned(wanted=2, budget=460 * MIB, held=150 * MIB, others=0, limit=512 * MIB, soft=210 * MIB, fresh=50 * MIB),
)  # fmt: skip

WELL = Facts(
    system="Linux", kernel="6.1.0", levels=(LEVEL, TOP), swap=0, swap_free=0, pools=(POOL,),
    settings=Settings(panic_on_oom=0, oom_kill_allocating_task=0, overcommit_memory=0, swappiness=60, migrates_requests=False),
    score=0, raises_only=False, kernel_log=True, pressure=True, shm=GIB, shm_used=MIB,
)  # fmt: skip

BARE = replace(POOL, guarded=False, reckoned=None)


def with_pool(**changes: Any) -> Facts:
    """A well-set machine, but for this of its pool."""
    return replace(WELL, pools=(replace(POOL, **changes),))


def with_setting(**changes: Any) -> Facts:
    """A well-set machine, but for this of the kernel's settings."""
    return replace(WELL, settings=replace(WELL.settings, **changes))


def with_unit(**changes: Any) -> Facts:
    """A well-set machine, but for this of the unit."""
    assert POOL.unit is not None
    return with_pool(unit=replace(POOL.unit, **changes))


def reckoned(**changes: Any) -> Facts:
    """A well-set machine, but for these figures of the pool."""
    assert POOL.reckoned is not None
    return with_pool(reckoned=replace(POOL.reckoned, **changes))


HEAVY = process(10, 400, 0)
EXEMPT = (process(11, 60, -1000), process(12, 60, -1000))
SWAPPED = (replace(WORKERS[0], swapped=60 * MIB), WORKERS[1])
MANY = tuple(process(number, 10, 300) for number in range(100, 130))
HIGH = LEVEL._replace(high=300 * MIB, usage=290 * MIB)

WRONG: list[tuple[str, Facts]] = [
    ("panic-on-oom", with_setting(panic_on_oom=1)),
    ("panic-on-oom", with_setting(panic_on_oom=2)),
    ("dies-whole", with_pool(dies_whole=SHOP)),
    ("unit-stops", with_unit(oom_policy="stop")),
    ("unit-stops", with_unit(oom_policy="kill")),
    ("nobody-is-killed", with_pool(never_killed=SHOP)),
    ("supervisor-first", with_pool(supervisor=HEAVY, rankings=(ranked(LEVEL, of=(HEAVY, *WORKERS)),))),
    ("supervisor-first", with_pool(workers=EXEMPT, rankings=(ranked(TOP, of=(SUPERVISOR, *EXEMPT)),))),
    ("nobody-may-be-killed", with_pool(supervisor=process(10, 30, -1000), workers=EXEMPT, rankings=())),
    ("best-effort", replace(WELL, container=Container.KUBERNETES, score=1000)),
    ("kills-who-asks", with_setting(oom_kill_allocating_task=1)),
    ("oomd-kills-the-unit", replace(with_unit(killed_for_pressure=True), killers=("systemd-oomd",))),
    ("workers-do-not-fit", reckoned(wanted=20)),
    ("near-the-limit", replace(WELL, pools=(replace(BARE, levels=(LEVEL._replace(used=500 * MIB, droppable=20 * MIB), TOP)),))),
    ("budget-too-low", reckoned(wanted=9)),
    ("soft-limit-too-low", reckoned(soft=52 * MIB)),
    ("no-room-for-a-replacement", reckoned(held=459 * MIB, others=20 * MIB)),
    ("too-many-workers", with_pool(workers=MANY, rankings=(ranked(LEVEL, of=(SUPERVISOR, *MANY)),))),
    ("another-goes-first", with_pool(rankings=(ranked(LEVEL, process(90, 400, 0, "redis-server")),))),
    ("no-limit", with_pool(levels=(LEVEL._replace(limit=None), TOP))),
    ("throttled", with_pool(levels=(HIGH, TOP))),
    ("in-swap", with_pool(workers=SWAPPED)),
    ("reuse-port", with_pool(program=replace(POOL.program, reuse_port=True))),
    ("strict-overcommit", with_setting(overcommit_memory=2)),
    ("address-space", with_pool(program=replace(POOL.program, limit_address_space=GIB))),
    ("data-limit", with_pool(program=replace(POOL.program, limit_data=GIB))),
    ("few-tasks", with_unit(tasks_current=3900)),
    ("shm-is-full", replace(WELL, shm_used=GIB - MIB)),
    ("shm-is-charged", replace(WELL, shm_used=100 * MIB)),
]


def test_a_well_set_machine() -> None:
    """Nothing to change, nor where nothing is known at all."""
    assert findings_of(WELL) == []
    assert findings_of(Facts(system="Darwin")) == []
    assert findings_of(Facts(system="Linux")) == []


@pytest.mark.parametrize(("code", "facts"), WRONG, ids=[f"{code}-{number}" for number, (code, _) in enumerate(WRONG)])
def test_each_thing_that_is_wrong(code: str, facts: Facts) -> None:
    """Exactly its own finding, with figures and a line to change."""
    (finding,) = findings_of(facts)

    assert finding.code == code
    assert re.search(r"\d", finding.fact) or code in ("oomd-kills-the-unit", "unit-stops")
    assert finding.why and finding.change and all(finding.change)


REUSING = replace(POOL, program=Program(reuse_port=True))
CACHED = replace(BARE, levels=(LEVEL._replace(used=500 * MIB, droppable=200 * MIB), TOP))
BIG, ITS_OWN = process(21, 400, 300), process(20, 30, 0)
BESIDE = replace(POOL, supervisor=ITS_OWN, workers=(BIG,), rankings=(ranked(LEVEL, BIG, ITS_OWN),))

RIGHT: list[tuple[str, Facts]] = [
    ("oomd may kill it, but does not run", with_unit(killed_for_pressure=True)),
    ("oomd leaves it alone", replace(with_unit(killed_for_pressure=True, preference="omit"), killers=("systemd-oomd",))),
    ("connections are migrated", replace(with_setting(migrates_requests=True), pools=(REUSING,))),
    ("nothing to be migrated is known", replace(with_setting(migrates_requests=None), pools=(REUSING,))),
    ("a BestEffort score outside of a pod", replace(WELL, score=1000)),
    ("a limit that can't be read", with_pool(levels=(LEVEL._replace(limit=None, unread=("memory.max",)), TOP))),
    ("limits that can't be seen", replace(with_pool(levels=(LEVEL._replace(limit=None), TOP)), cut_off=True)),
    ("page cache fills the limit", replace(WELL, pools=(CACHED,))),
    ("the other pool of the cgroup goes first", replace(WELL, pools=(POOL, BESIDE))),
    ("many workers with all the memory", with_pool(workers=MANY, levels=(LEVEL._replace(limit=64 * GIB),), rankings=())),
    ("no figures yet", reckoned(budget=None, held=None, others=None, limit=None, soft=None, fresh=None)),
    ("one process", with_pool(workers=(), rankings=(ranked(LEVEL, of=(SUPERVISOR,)),))),
]  # fmt: skip


@pytest.mark.parametrize("facts", [facts for _, facts in RIGHT], ids=[name for name, _ in RIGHT])
def test_nothing_is_wrong_with_it(facts: Facts) -> None:
    """No false finding."""
    assert findings_of(facts) == []


def test_dangers_come_first() -> None:
    """What takes the whole service down, before what hurts."""
    both = replace(with_pool(dies_whole=SHOP, workers=SWAPPED), settings=replace(WELL.settings, overcommit_memory=2, panic_on_oom=2))

    assert [finding.severity for finding in findings_of(both)] == [Severity.DANGER] * 2 + [Severity.WARNING] * 2


PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()


def test_each_finding_is_tried_and_documented() -> None:
    """A heading of docs/doctor.md for each; and no heading without."""
    source = "".join(Path(str(rule.__code__.co_filename)).read_text() for rule in RULES[:1])
    codes = set(re.findall(r'code="([a-z-]+)"', source))

    assert {code for code, _ in WRONG} == codes
    assert set(re.findall(r"^### ([a-z-]+)$", PAGE, re.MULTILINE)) == codes


def test_a_change_fits_where_it_runs() -> None:
    """A pod's manifest, docker's flags, a unit's drop-in, or a scope of systemd's: whichever there is."""
    free = (LEVEL._replace(limit=None), TOP)
    make: Callable[..., Facts] = lambda container, unit: replace(with_pool(levels=free, unit=unit), container=container)

    changes = [findings_of(make(container, unit))[0].change[0] for container, unit in (
        (Container.KUBERNETES, None), (Container.DOCKER, None), (Container.NONE, POOL.unit), (Container.NONE, None),
    )]  # fmt: skip

    assert [change.split()[0] for change in changes] == ["resources:", "docker", "systemctl", "systemd-run"]
