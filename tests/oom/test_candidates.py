"""Whom the kernel takes next, computed before it does: real kills in a real memory cgroup."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from serving import until

from oomsafe.kernel.oom_candidates import field_of, total_of
from oomsafe.kernel.oom_score import write_score
from oomsafe.kernel.process import PAGE
from oomsafe.kernel.sandbox import Sandbox
from oomsafe.policy.limits import Kind, Level, Source
from oomsafe.policy.victims import badness, ranked

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
LIMIT = 400 * MIB
KILLS = 20

#: It grows by what it is told to, in MiB, and says so; what it puts into a file in memory is nobody's resident memory.
HOLDER = """
import os, sys
held, file = [], os.memfd_create("held")
for line in sys.stdin:
    where, mib = line.split()
    for _ in range(int(mib)):
        held.append(bytearray(b"x") * (1 << 20)) if where == "own" else os.write(file, b"x" * (1 << 20))
    print(len(held), flush=True)
"""


class Holder:
    """A process in a cgroup that grows when it is told to."""

    def __init__(self, sandbox: Sandbox, score: int) -> None:
        argv = sandbox.command([sys.executable, "-S", "-E", "-c", HOLDER])
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.grow(0)
        write_score(score, self.process.pid)

    def grow(self, mib: int, where: str = "own") -> None:
        """Hold so much more; returns when it does, or was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{where} {mib}\n".encode())
        self.process.stdout.readline()

    def end(self) -> None:
        """Kill it, and reap it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def hold(cgroup: Callable[..., Sandbox]) -> Iterator[Callable[[Sandbox, int], Holder]]:
    """hold(sandbox, score): a Holder."""
    with ExitStack() as stack:

        def start(sandbox: Sandbox, score: int) -> Holder:
            holder = Holder(sandbox, score)
            stack.callback(holder.end)
            return holder

        yield start


def ranking(level: Level) -> list[int]:
    """The pids, first the one that the kernel takes first."""
    field, total = field_of(level), total_of(level)
    assert field is not None and total is not None and not field.unseen
    return [each.pid for each in ranked(field.candidates, total, PAGE)]


def test_twenty_kills(cgroup: Callable[..., Sandbox], hold: Callable[[Sandbox, int], Holder]) -> None:
    """Mixed sizes and scores, in the cgroup that is out of memory and in one below it: each is named before it is killed."""
    whole = cgroup(LIMIT)
    below = cgroup(None, whole)
    dice = random.Random(7)
    holders: list[Holder] = []
    for size, score in apart(dice, KILLS + 2):
        holders.append(hold(dice.choice([whole, below]), score))
        holders[-1].grow(size)
    grower = hold(whole, 0)
    level = Level(Source(Kind.CGROUP, whole.cgroup.path, whole.cgroup.version), LIMIT)

    named: list[int] = []
    while len(named) < KILLS:
        expected = ranking(level)
        grower.grow(1, "file")
        # a step may take two, if the first has not given its memory back when the kernel looks again
        taken = kills(whole, below) - len(named)
        named += expected[:taken]
        if taken:
            until(lambda: len(ended(holders)) == kills(whole, below), "the victims have ended")
            assert set(ended(holders)) == set(named)


def ended(holders: list[Holder]) -> list[int]:
    """The pids of those who have ended."""
    return [holder.process.pid for holder in holders if holder.process.poll() is not None]


def apart(dice: random.Random, count: int) -> list[tuple[int, int]]:
    """Sizes in MiB, and scores. The points of any two are more than 2 MiB apart: the kernel's own counters may be off by less."""
    found: list[tuple[int, int]] = []
    points: list[float] = []
    while len(found) < count:
        size, score = dice.randrange(1, 20), dice.randrange(900)
        new = badness(size * MIB, score, LIMIT)
        if all(abs(new - other) > 2 * MIB for other in points):
            found.append((size, score))
            points.append(new)
    return found


def kills(whole: Sandbox, below: Sandbox) -> int:
    """How many the kernel has killed in both; v1 counts each cgroup's own, v2 those below it too."""
    counts = [sandbox.cgroup.oom_kills() or 0 for sandbox in (whole, below)]
    return sum(counts) if whole.cgroup.version == 1 else counts[0]
