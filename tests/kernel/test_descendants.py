"""What a process has started, as real processes: programs count whole, forks by what they grow, what was there before not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from serving import until
from unit.children import Child, Line

from oomsafe.kernel.descendants import Descendants, since_boot

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel lists no children")

HOLDS = "import sys, time; kept = b'x' * ({mib} << 20); print('holds', flush=True); time.sleep(60)"


def program(mib: int) -> subprocess.Popen[bytes]:
    """One that holds so much."""
    started = subprocess.Popen([sys.executable, "-c", HOLDS.format(mib=mib)], stdout=subprocess.PIPE)
    assert started.stdout is not None
    assert started.stdout.readline() == b"holds\n"
    return started


@pytest.fixture
def programs() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Ended at the end."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for one in found:
        one.kill()
        one.communicate()


def held(of: Descendants) -> dict[int, int]:
    """By pid, in MiB."""
    return {one.pid: one.held // MIB for one in of.measure()}


def test_a_program_counts_whole(programs: list[subprocess.Popen[bytes]]) -> None:
    """One that was there before does not."""
    programs.append(program(30))
    time.sleep(0.05)  # the kernel tells start times in hundredths
    since = Descendants(os.getpid(), since_boot())
    assert held(since) == {}

    programs.append(program(40))

    found = held(since)
    assert set(found) == {programs[1].pid}
    assert 40 <= found[programs[1].pid] < 70


def test_a_fork_counts_by_what_it_grows() -> None:
    """What it shares is its parent's, whose size it has; so is a fork of it, and what it has executed counts whole."""
    kept = b"x" * (60 * MIB)

    def run(line: Line) -> None:
        more = []
        line.say("forked")
        line.hear()
        more.append(b"x" * (50 * MIB))
        line.say("grown")
        line.hear()
        if not os.fork():
            os.execv(sys.executable, [sys.executable, "-c", HOLDS.format(mib=20)])
        line.hear()

    since = Descendants(os.getpid(), since_boot())
    with Child(run) as child:
        child.hear()
        assert held(since) == {child.pid: 0}
        child.say("grow")
        child.hear()
        assert 49 <= held(since)[child.pid] <= 60
        child.say("execute")
        (other,) = until(lambda: [pid for pid, mib in held(since).items() if pid != child.pid and mib >= 20], "it holds what it will")
        assert held(since)[other] < 50
        os.kill(other, 9)
    assert len(kept) == 60 * MIB


def test_of_one_that_is_gone_there_are_none() -> None:
    """Nor does it raise."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    assert Descendants(gone.pid, 0).measure() == []
