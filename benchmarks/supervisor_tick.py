"""What a supervisor's tick costs, with many workers, all of them silent (each inside one long request), or none. Two trees side by side."""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Bytes that are written before each tick, because in a real second other processes use the caches.
TRASHED = 32 << 20

#: Ticks of a run that is counted, and how many more another one makes: the difference is what these cost. One of five checks the scores.
FEW, MORE = 2, 5


class Fleet:
    """A server that does nothing."""

    def spawn(self) -> int | None:
        """None."""
        return None

    def shrink(self) -> None:
        """Nothing."""

    def may_surge(self) -> bool:
        """Never."""
        return False


class Contestant:
    """The supervisor of one tree, in a process of its own, which ticks when it is told to."""

    def __init__(self, tree: Path, kind: str, workers: int, trashed: int) -> None:
        self.took: list[float] = []
        """Milliseconds of CPU of all ticks of each second."""
        arguments = ["--ticks-of", kind, "--workers", str(workers), "--trashed", str(trashed)]
        command = [sys.executable, __file__, *arguments]
        environ = {**os.environ, "PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tick(self) -> float:
        """Milliseconds of CPU of one tick."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("tick\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """It ends its workers, too."""
        self._process.communicate("", timeout=30)


@contextmanager
def pool(workers: int, kind: str) -> Iterator[tuple[object, list[object]]]:
    """(a supervisor with so many workers, the slots that are published to before each tick)."""
    from oomsafe.policy.settings import Policy
    from oomsafe.supervisor.supervisor import Supervisor

    supervisor = Supervisor(Policy(), "benchmark", workers, Fleet())
    born = [fork(supervisor, 1 << 20) for _ in range(workers)]
    try:
        yield supervisor, [slot for _, slot in born] if kind == "talking" else []
    finally:
        for pid, _ in born:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        supervisor.close()


def fork(supervisor, holds: int):
    """A worker that serves, and then sleeps."""
    from oomsafe.policy.state import State
    from oomsafe.policy.trend import Growth
    from oomsafe.scoreboard.layout import Counters
    from oomsafe.scoreboard.slot import Figures

    slot = supervisor.reserve()
    assert slot is not None
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        kept = b"x" * holds
        supervisor.enlist(slot)
        slot.need(len(kept), Growth())
        slot.publish(Figures(rss=holds, anon=holds, baseline=holds, soft=10 * holds), Counters())
        slot.set_state(State.SERVING)
        os.write(write, b"!")
        signal.pause()
    os.close(write)
    os.read(read, 1)
    os.close(read)
    supervisor.born(slot, pid)
    return pid, slot


def publish(slots) -> None:
    """Each worker says what it said before."""
    from oomsafe.scoreboard.layout import Counters
    from oomsafe.scoreboard.slot import Figures

    for slot in slots:
        slot.publish(Figures(rss=1, anon=1, baseline=1, soft=10), Counters())


def ticks_of(kind: str, workers: int, trashed: int) -> None:
    """A contestant: a tick for each line of its input, and how long it took as a line of its output."""
    trash = (ctypes.c_char * trashed)()
    with pool(workers, kind) as (supervisor, slots):
        supervisor.tick()
        for _ in sys.stdin:
            publish(slots)
            ctypes.memset(trash, 1, trashed)
            began = time.thread_time()
            supervisor.tick()
            print(1000 * (time.thread_time() - began), flush=True)


def ticks_with(kind: str, workers: int, count: int) -> None:
    """What strace and valgrind look at: FEW and so many ticks a second apart, and the rest of FEW and MORE seconds without one."""
    with pool(workers, kind) as (supervisor, slots):
        for number in range(FEW + MORE):
            time.sleep(1)
            publish(slots)
            if number < FEW + count:
                supervisor.tick()


def counted(tree: Path, kind: str, workers: int) -> tuple[float, float]:
    """(system calls, thousands of instructions outside the kernel) of a tick, one a second."""
    with tempfile.TemporaryDirectory() as folder:
        calls, instructions = [], []
        for count in (0, MORE):
            command = [sys.executable, __file__, "--counted", kind, str(count), "--workers", str(workers)]
            environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
            traced = ["strace", "-qq", "-o", f"{folder}/calls", *command]
            subprocess.run(traced, env=environ, check=True)
            text = Path(folder, "calls").read_text()
            calls.append(len(re.findall(r"^\w+\(", text, re.MULTILINE)))
            grind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={folder}/%p", *command]
            ground = subprocess.Popen(grind, env=environ, stderr=subprocess.DEVNULL)
            ground.wait()
            totals = re.search(r"^summary: (\d+)", Path(folder, str(ground.pid)).read_text(), re.MULTILINE)
            assert totals is not None
            instructions.append(int(totals[1]))
    return (calls[1] - calls[0]) / MORE, (instructions[1] - instructions[0]) / MORE / 1000


def spread(values: list[float]) -> str:
    """median (min-max)"""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """A row for each tree, each kind of pool, and each number of ticks a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parent.parent], help="folders with oomsafe in them")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--rates", type=int, nargs="*", default=[1, 10], help="ticks a second: gunicorn's arbiter 1, uvicorn's parent 10")
    parser.add_argument("--trashed", type=int, default=TRASHED)
    parser.add_argument("--count", action="store_true", help="system calls and instructions, with strace and valgrind, instead of time")
    parser.add_argument("--ticks-of", help=argparse.SUPPRESS)
    parser.add_argument("--counted", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ticks_of:
        ticks_of(arguments.ticks_of, arguments.workers, arguments.trashed)
    elif arguments.counted:
        ticks_with(arguments.counted[0], arguments.workers, int(arguments.counted[1]))
    elif arguments.count:
        print("| tree | workers | system calls a tick | instructions a tick, thousands |\n| --- | --- | --- | --- |")
        for kind in ("talking", "silent"):
            for tree in arguments.trees:
                calls, instructions = counted(tree, kind, arguments.workers)
                print(f"| {tree} | {arguments.workers}, {kind} | {calls:.0f} | {instructions:.0f} |", flush=True)
    else:
        print(f"load at start {os.getloadavg()[0]:.1f}\n| tree | workers | ticks a second | CPU a second, ms |\n| --- | --- | --- | --- |")
        for rate in arguments.rates:
            for kind in ("talking", "silent"):
                compare(arguments.trees, kind, rate, arguments)


def compare(trees: list[Path], kind: str, rate: int, arguments: argparse.Namespace) -> None:
    """The trees take turns at each tick."""
    contestants = [Contestant(tree, kind, arguments.workers, arguments.trashed) for tree in trees]
    try:
        for second in range(-1, arguments.seconds):  # the first one is not counted
            took = [0.0 for _ in contestants]
            for _ in range(rate):
                time.sleep(1 / rate)
                for number, contestant in enumerate(contestants):
                    took[number] += contestant.tick()
            if second >= 0:
                for contestant, milliseconds in zip(contestants, took, strict=True):
                    contestant.took.append(milliseconds)
    finally:
        for contestant in contestants:
            contestant.end()
    for tree, contestant in zip(trees, contestants, strict=True):
        print(f"| {tree} | {arguments.workers}, {kind} | {rate} | {spread(contestant.took)} |", flush=True)


if __name__ == "__main__":
    main()
