"""The Celery app under test: its broker, its pool and its policy come from the environment."""

from __future__ import annotations

import gc
import json
import logging.config
import mmap
import os
import subprocess
import sys
import time

import whole_messages  # noqa: F401  for nodes and senders alike
from celery import Celery

import oomsafe.celery

SETTINGS = {"broker_connection_retry_on_startup": True, **json.loads(os.environ.get("CELERY_CONF", "{}"))}
if "INSTALL_FIRST" in os.environ:
    app = Celery("proj")
    oomsafe.celery.install(app, **json.loads(os.environ["POLICY"]))
    app.config_from_object({"broker_url": os.environ["BROKER"], "result_backend": os.environ["BACKEND"], **SETTINGS})
else:
    app = Celery("proj", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
    app.conf.update(SETTINGS)
BALLAST = b"x" * (int(os.environ.get("BALLAST_MIB", "0")) << 20)
KEPT = []

if "POLICY" in os.environ and "INSTALL_FIRST" not in os.environ:
    oomsafe.celery.install(app, **json.loads(os.environ["POLICY"]))
if "LOGGING" in os.environ:
    logging.config.dictConfig(json.loads(os.environ["LOGGING"]))
if "SET_LATE" in os.environ:
    variable, _, text = os.environ["SET_LATE"].partition("=")
    os.environ[variable] = text
if "LEASE" in os.environ:
    from oomsafe.celery import notes

    notes.LEASE, notes.RENEW = float(os.environ["LEASE"]), float(os.environ["LEASE"]) / 4
if "BY_HAND" in os.environ:
    from celery.signals import worker_process_init

    worker_process_init.connect(oomsafe.celery.worker_process_init)


class Subclass(MemoryError):
    """What some libraries raise."""


class Unpicklable(MemoryError):
    """What can't cross to another process."""

    def __init__(self, *args):
        super().__init__(*args)
        self.handle = open("/dev/null")  # noqa: SIM115

    def __reduce__(self):
        raise TypeError("not this one")


@app.task
def leak(number, kib):
    """Keep so much for ever."""
    KEPT.append(b"x" * (kib << 10))
    return number


@app.task
def probe(tasks):
    """Have this process find out what it leaks."""
    return oomsafe.probe(requests=tasks, seconds=60)


@app.task
def about():
    """This child: its pid, its score, its name."""
    score, comm = (open(f"/proc/self/{name}").read().strip() for name in ("oom_score_adj", "comm"))  # noqa: SIM115
    return os.getpid(), int(score), comm


@app.task
def frozen():
    """How many of this child's objects no collection walks."""
    return gc.get_freeze_count()


@app.task
def sleep(seconds):
    """Take a while."""
    time.sleep(seconds)
    return seconds


def run_out(how):
    """Run out of memory, one way or another."""
    if how == "plain":
        raise MemoryError("its own")
    if how == "subclass":
        raise Subclass("a library's")
    if how == "unpicklable":
        raise Unpicklable("with a handle")
    if how == "chained":
        try:
            raise ValueError("first")
        except ValueError as error:
            raise MemoryError("second") from error
    bytearray(1 << 60)


@app.task
def out_of_memory(how):
    """In the task."""
    run_out(how)


@app.task(acks_late=True)
def out_of_memory_late(how):
    """In the task, acknowledged after it."""
    run_out(how)


class Hooked(app.Task):
    """Whose hook fails."""

    def on_success(self, *args):
        raise MemoryError("in a hook")


@app.task(base=Hooked)
def out_of_memory_in_a_hook(how):
    """Around the task."""
    return how


MIB = 1 << 20
#: Where a balloon ends by itself, should nobody stop it: the machine is shared.
ENOUGH = int(os.environ.get("ENOUGH_MIB", "1200"))


def at_speed(grow, mib_per_second=1024, chunk=4):
    """Call grow(bytes) so often that it makes that speed."""
    began, grown = time.monotonic(), 0
    while grown < ENOUGH:
        grow(chunk * MIB)
        grown += chunk
        time.sleep(max(0, began + grown / mib_per_second - time.monotonic()))


def in_python():
    """1 GiB/s in pure Python."""
    kept = []
    at_speed(lambda size: kept.append(b"x" * size))


def in_numpy():
    """1 GiB/s in numpy, array by array."""
    import numpy

    kept = []
    at_speed(lambda size: kept.append(numpy.ones(size // 8)))


def in_c():
    """In one C call that holds the GIL, as fast as memory can be filled: no Python code of this process runs meanwhile.

    It is shared memory, which the kernel refuses nobody.
    """
    import ctypes
    import mmap

    area = mmap.mmap(-1, ENOUGH * MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.PyDLL(None)
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memset(address, 1, ENOUGH * MIB)
    time.sleep(60)


HOW = {"python": in_python, "numpy": in_numpy, "c": in_c}


@app.task(memory_limit="200MiB")
def balloon(how):
    """Takes what it gets."""
    HOW[how]()
    return "not stopped"


@app.task(memory_limit="200MiB", acks_late=True)
def balloon_late(how):
    """The same, acknowledged after it."""
    HOW[how]()
    return "not stopped"


@app.task
def balloon_by_default(how):
    """With the app's limits."""
    HOW[how]()
    return "not stopped"


@app.task(soft_memory_limit="100MiB", memory_limit="300MiB")
def balloon_told(catches):
    """Told at its soft limit."""
    kept = []
    try:
        at_speed(lambda size: kept.append(b"x" * size), mib_per_second=256)
    except oomsafe.celery.SoftMemoryLimitExceeded as error:
        if not catches:
            raise
        size = len(kept) * 4
        kept.clear()
        time.sleep(0.3)  # what it has let go of is not held against it
        return [size, *error.args]


@app.task(memory_limit="200MiB", memory_absolute=True)
def whole(mib, seconds=1):
    """Whose child counts."""
    kept = b"x" * (mib * MIB)
    time.sleep(seconds)
    return len(kept)


@app.task
def share(mib):
    """Shared memory, which the kernel does not count against a child's hard limit; and it does not end."""
    with mmap.mmap(-1, mib * MIB) as pages:
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1
        time.sleep(60)


def note(number):
    """Count this run where no death can take it back."""
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(f"{number} {os.getpid()}\n")


@app.task(acks_late=True, reject_on_worker_lost=True)
def hog(number, mib_per_second=1024):
    """More than its cgroup has."""
    note(number)
    kept = []
    at_speed(lambda size: kept.append(b"x" * size), mib_per_second)
    return "not killed"


@app.task
def hog_early(number):
    """The same, acknowledged before it."""
    note(number)
    in_python()
    return "not killed"


@app.task(acks_late=True, reject_on_worker_lost=True)
def good(number):
    """Beside them."""
    time.sleep(0.02)
    return number


@app.task(acks_late=True, reject_on_worker_lost=True)
def slow(number, seconds):
    """Time to be killed in."""
    note(number)
    time.sleep(seconds)
    return number


@app.task
def lets_go():
    """Close every pipe that the child does not work with, among them the one by which Celery watches for its end."""
    from billiard.process import current_process

    worker = current_process()._target
    kept = {worker.inq._reader.fileno(), worker.outq._writer.fileno()}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if fd > 2 and fd not in kept and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                os.close(fd)
        except OSError:
            pass  # the descriptor of the listing itself
    return os.getpid()


PROGRAM = "import os, time; kept = b'x' * ({mib} << 20); open({where!r}, 'w').write(str(os.getpid())); time.sleep({seconds})"


@app.task(memory_limit="200MiB")
def program(mib, where, seconds=30):
    """Has a program do it."""
    return subprocess.run([sys.executable, "-c", PROGRAM.format(mib=mib, where=where, seconds=seconds)]).returncode


@app.task(memory_limit="200MiB")
def forks(mib, times, seconds=1):
    """Has forks of its, which share what it holds, and start nothing."""
    kept = b"x" * (mib * MIB)
    pids = []
    for _ in range(times):
        pids.append(os.fork())
        if not pids[-1]:
            os.fork()
            time.sleep(seconds)
            os._exit(len(kept) and 0)
    return [os.waitpid(pid, 0)[1] for pid in pids]


@app.task
def program_without_limits(mib, where):
    """Has a program do it, and waits a while."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(mib=mib, where=where, seconds=0)]).returncode
    time.sleep(1.5)
    return ended


@app.task(soft_memory_limit="60MiB", memory_limit="70MiB")
def brink(mib):
    """Just about its limit when it ends."""
    kept = b"x" * (mib * MIB)
    time.sleep(0.004)
    return len(kept) // MIB


def one_allocation():
    """Far more than there is, at once."""
    return bytearray(2 << 30)


def small_objects():
    """Objects of Python's own allocator."""
    kept = {}
    for number in range(ENOUGH * 4000):
        kept[number] = {"name": str(number)}
    return kept


def arrays():
    """numpy's."""
    import numpy

    kept = []
    for _ in range(ENOUGH):
        kept.append(numpy.ones(MIB // 8))
    return kept


def megabytes():
    """One after the other."""
    kept = []
    for _ in range(ENOUGH):
        kept.append(bytearray(MIB))
    return kept


def mapping():
    """Of which the system says so by an errno."""
    import mmap

    return mmap.mmap(-1, ENOUGH * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


KINDS = {"megabytes": megabytes, "at once": one_allocation, "numpy": arrays, "dict": small_objects, "mapping": mapping}
ENDED = []


def peak():
    """VmHWM of this child, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))


@app.task(memory_limit="200MiB")
def greedy(kind):
    """Asks for too much; its finally block runs."""
    try:
        return len(KINDS[kind]())
    finally:
        ENDED.append(kind)


@app.task(memory_limit="200MiB", acks_late=True, reject_on_worker_lost=True)
def greedy_late(kind):
    """The same, acknowledged after it."""
    note(kind)
    return len(KINDS[kind]())


@app.task(memory_limit="200MiB", acks_late=True, reject_on_worker_lost=True)
def shared_memory(number):
    """What the kernel refuses nobody; it is acknowledged after it."""
    note(number)
    in_c()


@app.task(memory_limit="200MiB")
def modest(kind):
    """Asks for too much, and then for less."""
    try:
        return KINDS[kind]()
    except MemoryError:
        pass
    return len(bytearray(100 * MIB))


@app.task(memory_limit="200MiB", autoretry_for=(MemoryError,), max_retries=1, retry_backoff=False, default_retry_delay=0)
def tried_again(kind):
    """As often as it may."""
    note(kind)
    return len(KINDS[kind]())


def forget_peak():
    """Reset VmHWM."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@app.task
def before():
    """This child: its pid, and what it holds, in bytes."""
    forget_peak()
    return os.getpid(), peak()


@app.task
def after():
    """This child: its pid, its peak in bytes, whose finally blocks have run in it, its RLIMIT_DATA, and how many MiB it may still get."""
    import resource

    highest, (soft, _) = peak(), resource.getrlimit(resource.RLIMIT_DATA)
    return os.getpid(), highest, ENDED, soft, len(bytearray(300 * MIB)) // MIB


@app.task(memory_limit="200MiB")
def program_at_its_limit(mib):
    """A program that needs more than the task has left."""
    kept = bytearray(150 * MIB)
    ended = subprocess.run([sys.executable, "-c", f"print(len(bytearray({mib} << 20)) >> 20)"], capture_output=True, text=True)
    return len(kept) // MIB, ended.stdout.strip()


@app.task(memory_limit="200MiB")
def untouched():
    """Maps much, touches some of it, and asks for no more than it may have."""
    import mmap

    area = mmap.mmap(-1, 150 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    kept = [bytearray(MIB) for _ in range(30)]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.05)
        try:
            kept.append(bytearray(100 * MIB))
            break
        except MemoryError:
            pass
    return len(area) // MIB, sum(map(len, kept)) // MIB


@app.task(memory_limit="200MiB")
def refused_inside():
    """A task that this one runs by apply() runs out; this one goes on."""
    inner = greedy.apply(args=("at once",))
    return inner.state, type(inner.result).__name__, len(bytearray(100 * MIB)) // MIB


if "BAD_TASK" in os.environ:

    @app.task(memory_limit="lots")
    def misspelt():
        """Whose limit can't be right."""
