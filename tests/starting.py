"""A program that starts a process or threads in one way, under a hard limit, and prints what came of it as JSON.

    python starting.py WAY [bare]

It is a process of its own because some of it changes the whole process. `bare`: nothing is exempt from the limit.
"""

from __future__ import annotations

import json
import mmap
import os
import posix
import resource
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oomsafe.kernel.rlimit import DataLimit, Reading
from oomsafe.worker import exemptions

MIB = 1 << 20

#: The application's own soft value, which every child must have.
OWN = 8 << 30

#: What the limit leaves the process, and how many threads of 8 MiB of stack it starts then.
ROOM, THREADS = 40 * MIB, 32

#: Where a child writes its soft value. A spawned Python runs this line again.
FILE = os.environ.setdefault("STARTING_FILE", tempfile.mktemp(prefix="oomsafe-starting-"))

ARGUMENTS = ["/bin/sh", "-c", f"cat /proc/self/limits > {FILE}"]


def measure() -> Reading:
    """What the limit measures."""
    words = [int(word) * resource.getpagesize() for word in Path("/proc/self/statm").read_text().split()]
    return Reading(words[5], words[1] - words[2], ROOM)


def until_refused(size: int) -> Iterator[mmap.mmap]:
    """Mappings, until the kernel refuses one."""
    try:
        while True:
            yield mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return


def write() -> None:
    """In a child: what soft value it has."""
    Path(FILE).write_text(f"Max data size {resource.getrlimit(resource.RLIMIT_DATA)[0]}")


def written() -> int:
    """What the child has written, in bytes; -1: unlimited."""
    for line in Path(FILE).read_text().splitlines():
        if line.startswith("Max data size"):
            soft = line.split()[3]
            return -1 if soft == "unlimited" else int(soft)
    raise AssertionError("the child wrote nothing")


def forked(pid: int) -> None:
    """Write in the child of a fork, and wait for it in its parent."""
    if pid:
        try:
            posix.waitpid(pid, 0)  # gevent's own may wait for ever for a child that ends at once
        except ChildProcessError:  # gevent was faster
            pass
        return
    status = 1
    try:
        write()
        status = 0
    finally:
        os._exit(status)


def subprocess_run(**options: Any) -> None:
    import subprocess

    subprocess.run(ARGUMENTS, check=True, **options)


def processes(method: str) -> None:
    from multiprocessing import get_context

    child = get_context(method).Process(target=write)  # type: ignore[attr-defined]
    child.start()
    child.join()
    assert child.exitcode == 0


def executor() -> None:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as pool:
        pool.submit(write).result()


def asyncio_subprocess(new_loop: Callable[[], Any]) -> None:
    import asyncio

    async def start() -> None:
        child = await asyncio.create_subprocess_exec(*ARGUMENTS)
        assert await child.wait() == 0

    loop = new_loop()
    try:
        loop.run_until_complete(start())
    finally:
        loop.close()


def asyncio_loop() -> Any:
    import asyncio

    return asyncio.new_event_loop()


def uvloop_loop() -> Any:
    import uvloop

    return uvloop.new_event_loop()


def pty_fork() -> None:
    import pty

    forked(pty.fork()[0])


PROCESSES: dict[str, Callable[[], None]] = {
    "subprocess": subprocess_run,
    "subprocess, preexec_fn": lambda: subprocess_run(preexec_fn=lambda: None),
    "subprocess, posix_spawn": lambda: subprocess_run(close_fds=False),
    "subprocess, new session": lambda: subprocess_run(start_new_session=True),
    "os.posix_spawn": lambda: os.waitpid(os.posix_spawn(ARGUMENTS[0], ARGUMENTS, os.environ), 0) and None,
    "os.posix_spawnp": lambda: os.waitpid(os.posix_spawnp("sh", ARGUMENTS, os.environ), 0) and None,
    "os.spawnv": lambda: os.spawnv(os.P_WAIT, ARGUMENTS[0], ARGUMENTS) and None,
    "os.system": lambda: os.system(shlex.join(ARGUMENTS)) and None,
    "os.popen": lambda: os.popen(shlex.join(ARGUMENTS)).read() and None,
    "os.fork": lambda: forked(os.fork()),
    "os.forkpty": lambda: forked(os.forkpty()[0]),
    "pty.fork": pty_fork,
    "multiprocessing fork": lambda: processes("fork"),
    "multiprocessing spawn": lambda: processes("spawn"),
    "multiprocessing forkserver": lambda: processes("forkserver"),
    "ProcessPoolExecutor": executor,
    "asyncio": lambda: asyncio_subprocess(asyncio_loop),
    "uvloop": lambda: asyncio_subprocess(uvloop_loop),
    "gevent": subprocess_run,
    "gevent os.fork": lambda: forked(os.fork()),
}


def held(start: Callable[[Callable[[], None]], object]) -> int:
    """How many of THREADS threads are running at once, each held by the others."""
    running, lock, enough, go_on = 0, threading.Lock(), threading.Event(), threading.Event()

    def run() -> None:
        nonlocal running
        with lock:
            running += 1
            if running == THREADS:
                enough.set()
        go_on.wait(20)

    started = 0
    try:
        for _ in range(THREADS):
            start(run)
            started += 1
        enough.wait(20)
    except (RuntimeError, MemoryError):
        pass
    finally:
        go_on.set()
    return min(started, running)


def thread_module(function: Callable[[], None]) -> None:
    import _thread

    _thread.start_new_thread(function, ())


def thread_pool() -> int:
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(THREADS)
    return held(pool.submit)


def to_thread() -> int:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    async def start() -> int:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS))
        return held(lambda run: loop.run_in_executor(None, run))

    return asyncio.run(start())


def gevent_pool() -> int:
    import gevent.monkey
    import gevent.threadpool

    pool = gevent.threadpool.ThreadPool(THREADS)
    real = gevent.monkey.get_original("threading", "Event"), gevent.monkey.get_original("_thread", "allocate_lock")
    running: list[int] = []
    enough, lock = real[0](), real[1]()

    def run() -> None:
        with lock:
            running.append(1)
        enough.wait(20)

    try:
        for _ in range(THREADS):
            pool.spawn(run)
        for _ in range(2000):
            if len(running) == THREADS:
                break
            gevent.sleep(0.01)
    except (RuntimeError, MemoryError):
        pass
    enough.set()
    return len(running)


STARTS: dict[str, Callable[[], int]] = {
    "threading": lambda: held(lambda run: threading.Thread(target=run, daemon=True).start()),
    "_thread": lambda: held(thread_module),
    "ThreadPoolExecutor": thread_pool,
    "asyncio executor": to_thread,
    "gevent's thread pool": gevent_pool,
}


def main(way: str, bare: bool) -> None:
    """Start in this way, under a limit."""
    if way.startswith("gevent"):
        from gevent import monkey

        monkey.patch_all()
        import gevent.threadpool  # noqa: F401
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (OWN, hard))
    limit = DataLimit(measure)
    limit.follow(measure())
    told: dict[str, Any] = {"missing": [] if bare else exemptions.install(limit)}
    told["before"] = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if way in STARTS:
        told["running"] = STARTS[way]()
    else:
        try:
            PROCESSES[way]()
            told["child"] = written()
        finally:
            if os.path.exists(FILE):
                os.unlink(FILE)
    told["after"], told["data"] = resource.getrlimit(resource.RLIMIT_DATA)[0], measure().data
    exemptions.remove()
    limit.lift()
    told["lifted"] = resource.getrlimit(resource.RLIMIT_DATA)[0]
    sys.stdout.write(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], "bare" in sys.argv[2:])
