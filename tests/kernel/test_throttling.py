"""That a pool is throttled at memory.high is said once for each time, by what the kernel's files tell; and when that is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel.trees import MIB, Tree, v1_mount, v2_mount

from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.cgroup import highs_of, stalled_of
from oomsafe.policy.throttling import CALM, LASTS, Episode, follow, is_throttled
from oomsafe.supervisor.throttling import ThrottlingLine


class Service:
    """A service in a slice whose memory.high is the smaller limit."""

    def __init__(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.tree = Tree(root)
        self.tree.at("0::/a/b\n", v2_mount(point="{root}/cg"))
        self.tree.v2("cg/a", 600 * MIB, usage=320 * MIB, inactive=10 * MIB, high=300 * MIB)
        self.tree.v2("cg/a/b", 500 * MIB, usage=290 * MIB)
        self.pressure(0)
        self.highs(7)
        self._caplog = caplog
        self._line = ThrottlingLine()
        self._now = 1000.0

    def highs(self, times: int) -> None:
        """memory.high has been passed so often."""
        self.tree.write("cg/a/memory.events.local", f"low 0\nhigh {times}\nmax 0\n")

    def pressure(self, microseconds: int | None) -> None:
        """So long has some process waited for memory; None: this kernel has no PSI."""
        path = self.tree.root / "cg/a/b/memory.pressure"
        path.unlink(missing_ok=True)
        if microseconds is not None:
            some = f"some avg10=3.00 avg60=1.00 avg300=0.20 total={microseconds}"
            path.write_text(f"{some}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n")

    def tick(self, highs: int, pressure: int | None) -> list[str]:
        """A second later; the lines until now."""
        self.highs(highs)
        self.pressure(pressure)
        self._now += 1.0
        self._line.tick(read_capacity(proc=self.tree.proc).levels, self._now)
        return [record.getMessage() for record in self._caplog.records if "throttles" in record.getMessage()]


@pytest.fixture
def service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Service:
    """The one of each test."""
    return Service(tmp_path, caplog)


def test_it_is_said_once_in_an_episode(service: Service) -> None:
    """With the level, the figures, and what to do; and anew after it was over."""
    assert service.tick(7, 0) == []
    assert service.tick(17, 400_000) == []
    assert service.tick(27, 800_000) == []
    (line,) = service.tick(37, 1_200_000)
    assert line == (
        f"the kernel throttles this pool: it is above memory.high 300 MiB of cgroup v2 {service.tree.root}/cg/a; 310 MiB of what is in "
        "use there can't be dropped; its processes waited for memory for 40% of the last second: raise MemoryHigh, or lower soft_limit, "
        "or have fewer workers"
    )
    for second in range(int(CALM)):
        assert len(service.tick(47 + second, 1_600_000 + second * 300_000)) == 1
    for _ in range(int(CALM) + 1):
        assert len(service.tick(100, 99_000_000)) == 1
    for second in range(4):
        service.tick(200 + second, 100_000_000 + second * 300_000)
    assert len(service.tick(300, 110_000_000)) == 2


@pytest.mark.parametrize(
    ("highs", "pressure"),
    [
        pytest.param([7, 7, 7, 7, 7], [0, 10**6, 2 * 10**6, 3 * 10**6, 4 * 10**6], id="it waits, and not for memory.high"),
        pytest.param([7, 17, 27, 37, 47], [0, 1000, 2000, 3000, 4000], id="page cache is reclaimed there, which takes no time"),
        pytest.param([7, 17, 17, 17, 17], [0, 10**6, 10**6, 10**6, 10**6], id="for a moment"),
    ],
)
def test_what_is_not_said(service: Service, highs: list[int], pressure: list[int]) -> None:
    """One row a situation."""
    assert [service.tick(*figures) for figures in zip(highs, pressure, strict=True)][-1] == []


def test_without_psi(service: Service) -> None:
    """What can't be dropped decides."""
    lines = [service.tick(7 + second, None) for second in range(5)][-1]
    assert len(lines) == 1
    assert "waited for memory" not in lines[0]


def test_without_memory_high(tmp_path: Path) -> None:
    """Nothing is read, on v1 neither."""
    for name, cgroup, mount in (("two", "0::/a\n", v2_mount(point="{root}/cg")), ("one", "5:memory:/a\n", v1_mount())):
        tree = Tree(tmp_path / name)
        tree.at(cgroup, mount)
        tree.v2("cg/a", 300 * MIB)
        tree.v1("cg/memory/a", 300 * MIB)
        ThrottlingLine().tick(read_capacity(proc=tree.proc).levels, 1.0)


def test_the_kernels_files(service: Service) -> None:
    """A kernel before 5.2 has no memory.events.local; what can't be read is None."""
    folder = f"{service.tree.root}/cg/a"
    assert highs_of(folder) == 7
    assert highs_of(f"{folder}/b") == 0
    assert highs_of("/nowhere") is None
    service.pressure(123)
    assert stalled_of(f"{folder}/b") == 123
    assert stalled_of(folder) is None
    (service.tree.root / "cg/a/b/memory.pressure").write_text("some total=garbage\n")
    assert stalled_of(f"{folder}/b") is None


@pytest.mark.parametrize(
    ("breaches", "stalled", "undroppable", "throttled"),
    [
        (0, 1.0, 400, False),
        (3, 0.05, None, True),
        (3, 0.04, 400, False),
        (3, None, 285, True),
        (3, None, 284, False),
        (3, None, None, False),
    ],
)
def test_when_it_is(breaches: int, stalled: float | None, undroppable: int | None, throttled: bool) -> None:
    """Up to memory.high of 300."""
    assert is_throttled(breaches, stalled, undroppable, 300) is throttled


@given(st.lists(st.tuples(st.floats(0.5, 3), st.booleans()), max_size=60))
def test_never_twice_within_an_episode(ticks: list[tuple[float, bool]]) -> None:
    """Law: between two lines there were CALM seconds without; and none comes before it has lasted."""
    episode: Episode | None = None
    now, said_at, last = 0.0, None, None
    for seconds, throttled in ticks:
        now += seconds
        episode, says = follow(episode, throttled, now)
        if says:
            assert episode is not None
            assert now - episode.since >= LASTS
            assert said_at is None or episode.since - (last or 0) >= CALM
            said_at = now
        last = now if throttled and said_at is not None else last
