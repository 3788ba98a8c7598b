"""The supervisor's part: limits said once, workers that die first, a scoreboard that goes with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from needs import need
from unit.children import in_child

from oomsafe.errors import ConfigError
from oomsafe.kernel.oom_score import read_score, write_score
from oomsafe.policy.settings import Policy
from oomsafe.pool.layout import Counters
from oomsafe.pool.scoreboard import Entry
from oomsafe.pool.slot import Figures, comm_of
from oomsafe.pool.supervisor import Supervisor

Said = Callable[[], list[str]]


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
        monkeypatch.setattr(supervisor, "_rescore_all", lambda now: (signal.raise_signal(signal.SIGUSR1), in_tick.extend(board.roll())))
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
