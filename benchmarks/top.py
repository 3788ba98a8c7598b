"""What `oomsafe top` costs: 8 pools of 64 workers, one refresh a second, in a terminal. CPU of its process, in % of a core.

The scoreboards are real, and so are the workers' processes, of which the kernel tells the memory; but they only sleep. Each publishes
once a second, has work in flight and counts under 20 routes.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from common import arguments, column, cpu_seconds, machine, progress, report, shown, table

from oomsafe.kernel.process import start_time
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.layout import BUCKETS, Counters
from oomsafe.scoreboard.slot import Figures, Slot

MIB = 1 << 20

#: Seconds until it has read everything once and its growth is known.
WARM_UP = 8.0

#: Seconds of one measurement.
WINDOW = 5.0


@contextmanager
def pool(number: int, workers: int) -> Iterator[None]:
    """A process that is the supervisor of so many workers."""
    command = [sys.executable, __file__, "--pool", str(number), "--workers", str(workers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        yield
        process.stdin.close()


def supervise(number: int, workers: int) -> None:
    """Be that process, until stdin is closed."""
    board, warnings = Scoreboard.create(workers, "gunicorn sync")
    assert not warnings, warnings
    board.header.name = f"pool{number}"
    end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
    with ExitStack() as stack:
        slots = [seated(board, stack) for _ in range(workers)]
        print("ready", flush=True)
        seconds = 0
        while not end.wait(1.0):
            seconds += 1
            for slot in slots:
                publish(slot, seconds)
    board.remove()


def seated(board: Scoreboard, stack: ExitStack) -> Slot:
    """A worker that sleeps, with one piece of work in flight."""
    slot = board.reserve()
    assert slot is not None
    process = stack.enter_context(subprocess.Popen(["sleep", "3600"]))
    stack.callback(process.kill)
    layout.write(slot._memory, slot._at + layout.STARTED_AT, layout.WORD, start_time(process.pid) or 0)
    layout.write(slot._memory, slot._at + layout.PID_AT, layout.WORD, process.pid)
    _, write, cells = slot.cells()
    name = b"GET /reports/2026"
    write(cells[0], len(name), time.monotonic(), MIB, name, 1)
    publish(slot, 0)
    slot.set_state(State.SERVING)
    return slot


def publish(slot: Slot, seconds: int) -> None:
    """Its figures of this second."""
    counters = Counters(work=seconds)
    for route in range(20):
        counters.route(f"GET /route/{route}")[:] = [seconds] * (1 + BUCKETS)
    layout.write(slot._memory, slot._at + layout.NEED_AT, layout.NEED, (100 + seconds) * MIB, MIB, MIB)
    slot.publish(Figures(rss=(100 + seconds) * MIB, anon=(100 + seconds) * MIB, soft=300 * MIB, in_flight=1), counters)


@contextmanager
def top(columns: int, rows: int) -> Iterator[tuple[int, list[int]]]:
    """Its pid, and in [0] the bytes that it has written to a terminal of this size."""
    written = [0]
    pid, terminal = pty.fork()
    if not pid:
        environ = {**os.environ, "TERM": "xterm-256color"}
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, "-m", "oomsafe.cli", "top"], environ)

    def drain() -> None:
        try:
            while found := os.read(terminal, 65536):
                written[0] += len(found)
        except OSError:  # it has ended
            pass

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield pid, written
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        thread.join(5)
        os.close(terminal)


def measure(columns: int, rows: int, windows: int) -> list[dict[str, float]]:
    """CPU and output of each window."""
    found = []
    with top(columns, rows) as (pid, written):
        time.sleep(WARM_UP)
        for number in range(windows):
            cpu, at, out = cpu_seconds([pid]), time.monotonic(), written[0]
            time.sleep(WINDOW)
            seconds = time.monotonic() - at
            found.append({"cpu": 100 * (cpu_seconds([pid]) - cpu) / seconds, "output": (written[0] - out) / seconds})
            progress(f"{columns}x{rows}: {number + 1} of {windows}")
    return found


def main() -> None:
    """Print a table, or with --json everything."""
    parser = arguments(__doc__ or "", rounds=12)
    parser.add_argument("--pools", type=int, default=8)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--pool", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.pool is not None:
        supervise(given.pool, given.workers)
        return
    sizes = [(80, 24), (160, 50), (200, 100)]
    with ExitStack() as stack:
        for number in range(given.pools):
            stack.enter_context(pool(number, given.workers))
        measured = {terminal: measure(*terminal, given.rounds) for terminal in sizes}
    rows = [
        [f"{columns} x {lines}", shown(column(found, "cpu"), 1), shown([each / 1024 for each in column(found, "output")], 1)]
        for (columns, lines), found in measured.items()
    ]
    head = ["terminal", "CPU, % of a core", "written to the terminal, KiB/s"]
    size = {"pools": f"{given.pools} of {given.workers} workers", "windows": f"{given.rounds} of {WINDOW:.0f} s each"}
    raw = {f"{columns}x{lines}": found for (columns, lines), found in measured.items()}
    report("oomsafe top", {**machine("textual"), **size}, [("", table(head, rows))], raw, given.json)


if __name__ == "__main__":
    main()
