"""What a supervisor's tick costs: in each second, with many workers, all of them silent (each inside one long request), or none."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.trend import Growth
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.supervisor.supervisor import Supervisor

#: Ticks in a second: gunicorn's arbiter makes one, uvicorn's supervisor ten.
TICKS = 10


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


def fork(supervisor: Supervisor, holds: int) -> tuple[int, Slot]:
    """A worker that serves, and then sleeps."""
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


def main() -> None:
    """A line for each kind of pool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--strace", action="store_true", help="count system calls, in another run; strace must be there")
    parser.add_argument("--only", choices=["silent", "talking"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for kind in [arguments.only] if arguments.only else ["talking", "silent"]:
        if arguments.strace:
            command = [sys.executable, __file__, "--workers", str(arguments.workers), "--seconds", str(arguments.seconds), "--only", kind]
            print(
                kind,
                subprocess.run(["strace", "-c", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE).stderr.decode(),
            )
        else:
            print(f"{arguments.workers} workers, {kind}: {measure(arguments.workers, arguments.seconds, kind):.2f} ms of CPU a second")


def measure(workers: int, seconds: int, kind: str) -> float:
    """Milliseconds of CPU that the supervisor takes for its ticks, in each second."""
    supervisor = Supervisor(Policy(), "benchmark", workers, Fleet())
    born = [fork(supervisor, 1 << 20) for _ in range(workers)]
    try:
        spent = 0.0
        supervisor.tick()
        for _ in range(seconds * TICKS):
            if kind == "talking":
                for _, slot in born:
                    slot.publish(Figures(rss=1, anon=1, baseline=1, soft=10), Counters())
            time.sleep(1 / TICKS)
            began = time.process_time()
            supervisor.tick()
            spent += time.process_time() - began
        return 1000 * spent / seconds
    finally:
        for pid, _ in born:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        supervisor.close()


if __name__ == "__main__":
    main()
