"""The supervisor's part: limits said once, workers that die first, a scoreboard that goes with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from needs import need
from unit.children import Child, Line, in_child
from unit.scripted import CGROUP

from oomsafe.errors import ConfigError
from oomsafe.kernel.oom_score import read_score, write_score
from oomsafe.kernel.process import sizes_of
from oomsafe.policy.limits import Capacity
from oomsafe.policy.recycle import Order
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard.board import Entry
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures, Slot, comm_of
from oomsafe.supervisor import onlooker, replacements
from oomsafe.supervisor import supervisor as module
from oomsafe.supervisor.replacements import PERMITTED_FOR
from oomsafe.supervisor.supervisor import Supervisor

Said = Callable[[], list[str]]
MIB = 1 << 20


def test_says_its_limits_once(said: Said) -> None:
    """At boot: one line with the limits in force; a changed number of workers says nothing, a reload says it anew."""
    supervisor = Supervisor(Policy(soft_limit="64MiB"), "test", 3)
    at_boot = said()
    supervisor.change(4)
    changed = said()
    supervisor.change(4, Policy(soft_limit="65MiB", dry_run=True))
    supervisor.close()

    (line,) = at_boot
    assert line.startswith("oomsafe guards 3 workers: soft limit 64.0 MiB each, budget ")
    assert changed == at_boot
    assert "soft limit 65.0 MiB" in said()[1]
    assert said()[1].endswith("dry run: nothing will be done")


def test_says_them_again_when_they_have_changed(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that was set anew is said; what others use is on the scoreboard at once, and not in the log each time."""
    allowed = [Capacity(600 * MIB, CGROUP, working_set=50 * MIB, others=0)]
    monkeypatch.setattr(module, "read_capacity", lambda **more: replace(allowed[0], workers=more["workers"]))
    clock = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    supervisor = Supervisor(Policy(soft_limit="64MiB"), "test", 3)
    assert supervisor.board is not None

    def at(seconds: float, capacity: Capacity) -> tuple[int | None, int | None]:
        clock[0], allowed[0] = 1000.0 + seconds, capacity
        supervisor.tick()
        seen = supervisor.board.read()  # type: ignore[union-attr]
        return seen.limit, seen.others

    assert at(1, Capacity(300 * MIB, CGROUP, working_set=50 * MIB, others=0)) == (300 * MIB, 0)
    assert at(3, Capacity(300 * MIB, CGROUP, working_set=150 * MIB, others=100 * MIB)) == (300 * MIB, 100 * MIB)
    assert at(5, Capacity(300 * MIB, CGROUP, working_set=152 * MIB, others=102 * MIB)) == (300 * MIB, 100 * MIB)
    assert at(7, Capacity(290 * MIB, CGROUP, working_set=152 * MIB, others=102 * MIB)) == (290 * MIB, 102 * MIB)
    assert at(100, Capacity(290 * MIB, CGROUP, working_set=210 * MIB, others=160 * MIB)) == (290 * MIB, 160 * MIB)
    seen = supervisor.board.read()
    supervisor.close()

    assert (seen.held, seen.source) == (50 * MIB, str(CGROUP))
    lines = [line.split(", supervisor")[0].partition("budget ")[2] for line in said()]
    assert lines == [
        "540 MiB of 600 MiB (cgroup v2 /here)",
        "270 MiB of 300 MiB (cgroup v2 /here)",
        "169 MiB of 290 MiB (cgroup v2 /here, others use 102 MiB)",
        "117 MiB of 290 MiB (cgroup v2 /here, others use 160 MiB)",
    ]  # fmt: skip


def test_what_a_pool_holds_with_another_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the process has started which is above both: what the other has is not used by others."""
    asked: list[Callable[[], int | None]] = []

    def read(held: Callable[[], int | None], **_: object) -> Capacity:
        asked.append(held)
        return Capacity(1 << 40, CGROUP)

    monkeypatch.setattr(module, "read_capacity", read)
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    hold = "held = b'x' * (100 << 20); print('holds', flush=True); input()"
    supervisors = [Supervisor(Policy(), "test", 1, beside=beside) for beside in (0, 1)]
    with subprocess.Popen([sys.executable, "-c", inner, hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        alone, both = (held() or 0 for held in asked[:2])
        other.communicate("\n")
    for supervisor in supervisors:
        supervisor.close()

    assert alone < both - 100 * MIB


def test_a_worker_enlists() -> None:
    """In the fork: its slot, its name, and a higher score; the supervisor keeps its own."""
    need(os.path.exists("/proc/self/oom_score_adj"), "no oom_score_adj here")
    before = read_score()
    assert before is not None
    need(before <= 700, "this process's oom_score_adj is high already")
    supervisor = Supervisor(Policy(worker_oom_score_adj=300), "test", 1)
    slot = supervisor.reserve()
    assert slot is not None

    def enlist() -> tuple[int | None, str, int]:
        supervisor.enlist(slot)
        (worker,) = supervisor.board.read().workers  # type: ignore[union-attr]
        supervisor.close()
        return read_score(), Path("/proc/self/comm").read_text().strip(), worker.pid - os.getpid()

    seen = in_child(enlist)

    assert (before + 300, comm_of(os.getpid(), slot), 0) == seen
    assert before == read_score()
    assert supervisor.board is not None
    assert os.path.exists(str(supervisor.board.path))
    supervisor.close()


def test_a_dry_run_raises_no_score() -> None:
    """It does nothing."""
    supervisor = Supervisor(Policy(dry_run=True, worker_oom_score_adj=300), "test", 1)

    after = in_child(lambda: (supervisor.enlist(None), read_score())[1])  # type: ignore[func-returns-value]

    assert read_score() == after
    supervisor.close()


def test_a_dry_run_mends_its_scoreboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks must find it: that does nothing to the workers."""
    supervisor = Supervisor(Policy(dry_run=True), "test", 1)
    assert supervisor.board is not None
    mended: list[str] = []
    monkeypatch.setattr(supervisor.board, "mend", lambda: mended.append("now"))

    supervisor.tick()

    assert mended == ["now"]
    supervisor.close()


def test_nothing_is_above_1000(said: Said) -> None:
    """A BestEffort pod's supervisor: the kernel can't be told, and that is said at boot, not found out later."""
    need(os.path.exists("/proc/self/oom_score_adj"), "no oom_score_adj here")

    def boot() -> list[str]:
        write_score(1000)
        Supervisor(Policy(), "test", 1).close()
        return said()

    assert any("nothing is above 1000" in line for line in in_child(boot))


def test_the_scoreboard_goes_with_it() -> None:
    """Its path is in the environment of what it starts; the file goes when it closes, and not when a fork of it does."""
    supervisor = Supervisor(Policy(), "test", 1)
    assert supervisor.board is not None
    path = str(supervisor.board.path)
    in_child(supervisor.close)

    assert os.environ["OOMSAFE_SCOREBOARD"] == path
    assert os.path.exists(path)
    supervisor.close()
    assert not os.path.exists(path)


def test_a_worker_that_is_reaped_in_a_signal_s_handler_waits_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn before 24 does that, also while another's counts go into the totals: none is lost, and none counts twice."""
    supervisor = Supervisor(Policy(), "test", 2)
    board = supervisor.board
    assert board is not None
    slots = [supervisor.reserve() for _ in range(3)]
    for slot in slots:
        assert slot is not None
        slot.claim()
        slot.publish(Figures(), Counters(work=1))
    add = Counters.add

    def interrupted(totals: Counters, other: Counters) -> None:
        monkeypatch.setattr(Counters, "add", add)
        signal.raise_signal(signal.SIGUSR1)
        add(totals, other)

    before = signal.signal(signal.SIGUSR1, lambda *_: supervisor.release(slots[1]))
    try:
        monkeypatch.setattr(Counters, "add", interrupted)
        supervisor.release(slots[0])
        after_a_release = [entry.number for entry in board.roll()], board.read().totals.work

        signal.signal(signal.SIGUSR1, lambda *_: supervisor.release(slots[2]))
        monkeypatch.setattr(supervisor, "_rescore_all", lambda: (signal.raise_signal(signal.SIGUSR1), in_tick.extend(board.roll())))
        in_tick: list[Entry] = []
        supervisor.tick()
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert after_a_release == ([2], 3)
    assert [entry.number for entry in in_tick] == [2]
    assert board.roll() == []
    assert board.read().totals.work == 3
    supervisor.close()


@pytest.mark.parametrize("field", ["max_unavailable", "soft_limit", "hard_limit", "budget"])
def test_figures_that_fit_no_field(field: str) -> None:
    """A number that no machine has is refused before it can meet a field of the scoreboard that is too small for it."""
    with pytest.raises(ConfigError):
        Policy(**{field: 1 << 70})


class Server:
    """A server whose workers are slots: it starts as many as it is told to, and counts."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self.extra, self.full = 0, False
        self.slots: list[Slot] = []

    def spawn(self) -> int | None:
        assert self.supervisor is not None
        slot = self.supervisor.reserve()
        assert slot is not None
        if self.full:
            self.supervisor.not_started(slot.number, slot.generation, BlockingIOError(11, "Resource temporarily unavailable"))
            return None
        self.extra += 1
        slot.claim()
        self.slots.append(slot)
        return slot.generation

    def shrink(self) -> None:
        self.extra -= 1

    def may_surge(self) -> bool:
        return True


@pytest.fixture
def pool() -> Iterator[Callable[..., tuple[Server, Supervisor, list[Slot]]]]:
    """pool(workers, **policy): a supervised pool whose workers serve, and hold 30 MiB each since their boot."""
    made: list[Supervisor] = []

    def make(workers: int, **policy: Any) -> tuple[Server, Supervisor, list[Slot]]:
        server = Server()
        made.append(Supervisor(Policy(**{"soft_limit": "100MiB", "budget": "8GiB", **policy}), "test", workers, server))
        server.supervisor = made[-1]
        slots = [slot for _ in range(workers) if (slot := made[-1].reserve()) is not None]
        for slot in slots:
            slot.claim()
            holds(slot, 30, State.SERVING)
        made[-1].tick()
        return server, made[-1], slots

    yield make
    for supervisor in made:
        supervisor.close()


def holds(slot: Slot, used: int | None, state: int, rss: int | None = None, hard: int | None = None, aged: bool = False) -> None:
    """This worker says that it holds so many MiB, and whether it has served for its lifetime."""
    sizes = (None if size is None else size * MIB for size in (used if rss is None else rss, 30, 100, hard))
    rss, baseline, soft, hard = sizes
    slot.need(None if used is None else used * MIB, Growth(), aged)
    slot.publish(Figures(rss=rss, anon=rss, baseline=baseline, soft=soft, hard=hard), Counters())
    slot.set_state(state)


def test_a_worker_that_is_reaped_between_two_looks_is_not_one_too_few(pool: Any) -> None:
    """gunicorn before 24 reaps in a signal's handler: it counts its workers before the supervisor has looked again."""
    server, supervisor, (first, _) = pool(2)
    holds(first, 120, State.WAITING)
    supervisor.tick()
    holds(server.slots[0], 30, State.SERVING)
    supervisor.tick()
    ordered = first.order

    supervisor.release(first)

    assert (ordered, server.extra) == (Order.GO, 0)


@pytest.mark.parametrize("served", [True, False])
def test_a_replacement_that_is_reaped_between_two_looks_is_not_one_too_few(pool: Any, served: bool) -> None:
    """Nor is that."""
    server, supervisor, (first, _) = pool(2)
    holds(first, 120, State.WAITING)
    supervisor.tick()
    if served:
        holds(server.slots[0], 30, State.SERVING)

    supervisor.release(server.slots[0])

    assert (first.order, server.extra) == (Order.NONE, 0)


def test_a_replacement_that_can_not_be_started_changes_nothing(pool: Any, said: Said) -> None:
    """It is said once, and tried again later."""
    server, supervisor, (first, _) = pool(2)
    server.full = True
    holds(first, 120, State.WAITING)

    for _ in range(3):
        supervisor.tick()

    assert (server.extra, first.order, len(supervisor.board.roll())) == (0, Order.NONE, 2)
    assert [line for line in said() if "can't be started" in line] == [
        "a worker can't be started (BlockingIOError(11, 'Resource temporarily unavailable')): those that serve stay; next try in 1 s"
    ]


@pytest.mark.parametrize(
    ("first", "second", "worst"),
    [
        pytest.param((120, 120), (105, 300), 0, id="by the metric of the limit, not by rss"),
        pytest.param((None, 300), (105, 105), 1, id="a figure that is not known is not 0, nor is it anything"),
        pytest.param((300, 300), (120, 250), 1, id="over a hard limit of 200"),
    ],
)
def test_who_is_the_worst(pool: Any, first: tuple[int | None, int], second: tuple[int | None, int], worst: int) -> None:
    """The one that is replaced first."""
    server, supervisor, slots = pool(3)
    hard = 200 if worst == 1 and first[0] == 300 else None
    for slot, (used, rss) in zip(slots, (first, second), strict=False):
        holds(slot, used, State.WAITING, rss=rss if rss != 300 else 150, hard=hard)

    supervisor.tick()
    for slot in server.slots:
        holds(slot, 30, State.SERVING)
    supervisor.tick()

    assert [slot.order is not Order.NONE for slot in slots[:2]] == [worst == 0, worst == 1]


def test_a_worker_without_a_slot_is_nobody_else(pool: Any) -> None:
    """All slots are taken: who has none is not the worker in slot 0."""
    _, supervisor, slots = pool(2)
    seat = supervisor.seat(None)

    supervisor.tell_to_drain(seat.number, seat.generation)
    released = supervisor.release_seat(seat.number, seat.generation)

    assert (seat.number, seat.generation, released) == (None, None, False)
    assert [slot.order for slot in slots] == [Order.NONE, Order.NONE]


def test_that_nobody_serves_is_said_and_counted(pool: Any, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before somebody has; when it lasts, and for how long when it is over."""
    monkeypatch.setattr(replacements, "UNSERVED_FOR", 0)
    _, supervisor, slots = pool(2)
    for slot in slots:
        slot.set_state(State.DRAINING)
    supervisor.tick()
    supervisor.tick()
    meanwhile = [line for line in said() if "serve" in line]
    slots[0].set_state(State.SERVING)
    supervisor.tick()

    (first, second) = [line for line in said() if "serve" in line]
    assert meanwhile == [first]
    assert re.fullmatch(r"no worker serves, for \d\.\d s now: 1 start, 2 drain or leave", first)
    assert re.fullmatch(r"a worker serves again: for \d\.\d s none did", second)
    assert supervisor.board.read().unserved > 0


def test_over_its_budget_the_worst_goes_at_once(pool: Any, said: Said) -> None:
    """No replacement first, and the other keeps still; the line has the figures."""
    server, supervisor, slots = pool(2, budget=1 * MIB)
    holds(slots[0], 120, State.WAITING)
    holds(slots[1], 180, State.WAITING)
    for _ in range(3):
        supervisor.tick()

    assert (server.extra, [slot.order for slot in slots]) == (0, [Order.NONE, Order.PERMIT])
    (line,) = [line for line in said() if "may go" in line]
    assert line.startswith("the worker in slot 1 (180 MiB) may go before its replacement is there: of a budget of 1.0 MiB, ")
    assert line.endswith("1 other serves")


@pytest.mark.parametrize("metric", ["anon", "rss"])
def test_a_worker_that_says_nothing_is_looked_at(pool: Any, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """What it holds by its limit's metric is what it said, and what it has grown by since; when it says something itself, that counts."""
    monkeypatch.setattr(onlooker, "SILENT_FOR", 0.0)
    monkeypatch.setattr(onlooker, "CHECK_EVERY", 0.0)
    _, supervisor, (first, _) = pool(2)
    supervisor.policy = Policy(metric=metric)
    # this process stands for the worker: half of what it says is what it shares
    rss, anon = sizes_of(os.getpid()) or (0, 0)
    first.need((rss if metric == "rss" else anon) // 2, Growth())
    first.publish(Figures(rss=rss, anon=anon), Counters())
    grown = bytearray(b"x") * (64 * MIB)

    supervisor.tick()
    seen = next(worker for worker in supervisor.board.read().workers if worker.slot == first.number)
    entry = next(entry for entry in supervisor.board.roll() if entry.number == first.number)
    first.publish(Figures(rss=7, anon=5), Counters())
    said = next(worker for worker in supervisor.board.read().workers if worker.slot == first.number)

    assert len(grown) == 64 * MIB
    for figures in (seen.figures, entry):
        assert figures.rss == pytest.approx(rss + 64 * MIB, abs=8 * MIB)
        assert figures.anon == pytest.approx(anon + 64 * MIB, abs=8 * MIB)
    assert seen.used == entry.used == pytest.approx((rss if metric == "rss" else anon) // 2 + 64 * MIB, abs=8 * MIB)
    assert (said.figures.rss, said.figures.anon) == (7, 5)


def test_a_worker_that_says_nothing_is_measured_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one: what it has taken is found; once it is dead, reaped or not, its last figures stay."""
    for module_, name in ((onlooker, "SILENT_FOR"), (onlooker, "CHECK_EVERY"), (module, "FOLLOW_EVERY")):
        monkeypatch.setattr(module_, name, 0.0)
    supervisor = Supervisor(Policy(), "test", 1)
    board, slot, own = supervisor.board, supervisor.reserve(), _descriptors_of(os.getpid())
    assert board is not None
    assert slot is not None

    def serves(line: Line) -> None:
        slot.claim()
        slot.publish(Figures(rss=1, anon=1), Counters())
        slot.set_state(State.SERVING)
        line.say("serves")
        held = bytearray(b"x") * line.hear()
        line.say(len(held))
        line.hear()

    def measured() -> int:
        supervisor.tick()
        (entry,) = board.roll()
        return entry.rss or 0

    with Child(serves) as worker:
        worker.hear()
        supervisor.born(slot, worker.pid)
        before = measured()
        worker.say(64 * MIB)
        worker.hear()
        grown, open_now = measured(), _descriptors_of(worker.pid)
        in_fork = in_child(lambda: _descriptors_of(worker.pid))
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        dead = measured()
        worker.reap()
        gone = measured()
        supervisor.release(slot)
        supervisor.tick()
    left = _descriptors_of(worker.pid)
    supervisor.close()

    assert grown - before == pytest.approx(64 * MIB, abs=8 * MIB)
    assert dead == gone == grown
    assert (open_now, in_fork, left) == (1, 0, 0)
    assert _descriptors_of(os.getpid()) == own


def _descriptors_of(pid: int) -> int:
    """How many descriptors this process has of the statm of `pid`."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return links.count(f"/proc/{pid}/statm")


def test_a_worker_that_has_served_its_time_is_replaced_first(pool: Any) -> None:
    """Below its limit, and one more comes before it goes."""
    server, supervisor, (first, second) = pool(2)
    holds(first, 40, State.WAITING, aged=True)
    supervisor.tick()
    meanwhile = (server.extra, first.order)
    holds(server.slots[0], 30, State.SERVING)

    supervisor.tick()

    assert meanwhile == (1, Order.NONE)
    assert (first.order, second.order) == (Order.GO, Order.NONE)


def test_a_worker_that_has_served_its_time_where_nobody_can_tell_what_it_holds(pool: Any) -> None:
    """Its replacement comes first all the same: nothing speaks against it."""
    server, supervisor, slots = pool(1)
    (slot,) = slots
    slot.need(None, Growth(), True)
    slot.publish(Figures(), Counters())
    slot.set_state(State.WAITING)

    supervisor.tick()

    assert (server.extra, slot.order) == (1, Order.NONE)


def test_a_permit_that_is_not_used_lapses(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker is below its limit again; when it comes over it later, others may be away."""
    _, supervisor, (first, _) = pool(2, surge=False)
    holds(first, 120, State.WAITING)
    supervisor.tick()
    permitted = first.order
    holds(first, 60, State.SERVING)
    supervisor.tick()
    still = first.order
    later = time.monotonic() + PERMITTED_FOR
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later))

    supervisor.tick()

    assert (permitted, still, first.order) == (Order.PERMIT, Order.PERMIT, Order.NONE)


def test_says_its_lifetime(said: Said) -> None:
    """With the other limits in force, at boot."""
    supervisor = Supervisor(Policy(soft_limit="100MiB", max_lifetime="6h"), "test", 2)
    supervisor.close()

    (line,) = [line for line in said() if "guards 2 workers" in line]
    assert "soft limit 100 MiB each, max_lifetime 6 h, budget" in line
