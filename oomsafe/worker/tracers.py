"""The tracers that a probe uses: memray where it is installed, which sees every allocator, else tracemalloc, which sees Python's.

Imported only by a worker that is probed: it is recycled afterwards, and what these take goes with it.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from oomsafe.kernel.handles import own_handles
from oomsafe.policy.probe import Alive, Frame

#: Frames of each stack that tracemalloc keeps. Each costs time at every allocation: six reach from a line through a helper or two to the
#: endpoint that called it.
DEPTH = 6


class CanNotTraceError(Exception):
    """This tracer can't be used here; the text says why."""


class Tracer(Protocol):
    """Traces all allocations of this process from start() to stop()."""

    name: str
    """With its version."""

    def start(self) -> None:
        """Begin. Raises CanNotTraceError."""

    def stop(self) -> None:
        """End: the process is as fast as before. Later calls change nothing. May be called in any thread."""

    def alive(self) -> Iterator[Alive]:
        """What was allocated meanwhile and is alive; ends the tracing. None is lost if stop() was called first, but by tracemalloc."""

    @property
    def memory(self) -> int | None:
        """What the tracer itself holds, in bytes; None: not known."""


#: Bytes that CPython (3.11 and newer) maps at a time for a thread's frames (DATA_STACK_CHUNK_SIZE in Python/pystate.c), and keeps until the
#: call returns that needed them: they are no matter of its line's.
CHUNK = 16 << 10

#: The greatest object that Python's own allocator has (SMALL_REQUEST_THRESHOLD in Objects/obmalloc.c).
SMALL = 512


def holds_frames(size: int, allocations: int, threads: int) -> bool:
    """Whether what was allocated at one stack can be no more than memory for the frames of so many threads.

    Each has one CHUNK at most that is due to a call at one depth. memray adds up whatever has the same stack, frame objects that it has
    Python make among it (3.13: 192 bytes), and tells the allocator of the first alone.
    """
    chunks, rest = divmod(size, CHUNK)
    return 0 < chunks <= min(threads, allocations) and rest <= (allocations - chunks) * SMALL


class Memray:
    """memray, which records to a file. In the format that keeps one record for each stack.

    Its other format, with a record for each allocation, would survive a SIGKILL of the worker, but is thousands of times as large (318 MB
    after 2000 requests that each allocate a few thousand objects, which then took 78 s to read, beside 57 kB and 2 ms).
    """

    def __init__(self, new_file: Callable[[], str]) -> None:
        self._new_file = new_file
        self._tracker: Any = None
        self._threads = 0
        self._path = ""
        self.name = "memray"

    def start(self) -> None:
        """Begin."""
        import threading

        if sys.getprofile() is not None or getattr(threading, "_profile_hook", None) is not None:
            raise CanNotTraceError("the app has a profiler of its own (sys.setprofile), which memray would replace")
        try:
            import memray
        except ImportError:
            raise CanNotTraceError("memray is not installed: pip install 'oomsafe[probe]'") from None
        self.name = f"memray {getattr(memray, '__version__', '')}".strip()
        try:
            self._path = self._new_file()
            destination = memray.FileDestination(self._path, overwrite=True, compress_on_exit=False)
            tracker = memray.Tracker(
                destination=destination, trace_python_allocators=True, memory_interval_ms=1000,
                file_format=memray.FileFormat.AGGREGATED_ALLOCATIONS,
            )  # fmt: skip
            _in_a_thread(tracker.__enter__)
        except Exception as error:  # another version, another tracker that runs, a full disk
            raise CanNotTraceError(f"{self.name} can't trace here ({error!r})") from error
        self._tracker = tracker

    def stop(self) -> None:
        """End."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.__exit__(None, None, None)
            self._threads = own_handles().threads or 1

    def alive(self) -> Iterator[Alive]:
        """Read it from the file."""
        self.stop()
        from memray import FileReader

        with FileReader(self._path) as reader:
            for record in reader.get_leaked_allocation_records(merge_threads=True):
                if holds_frames(record.size, record.n_allocations, self._threads):
                    continue
                stack = tuple(Frame(file, line, function) for function, file, line in record.stack_trace())
                yield Alive(record.size, None, stack)  # it has merged them, and counts less

    @property
    def memory(self) -> int | None:
        """memray does not say."""
        return None


class Tracemalloc:
    """Python's own tracemalloc, which sees neither C code's malloc nor mmap."""

    def __init__(self) -> None:
        self.name = f"tracemalloc of Python {sys.version_info[0]}.{sys.version_info[1]}"
        self._started = False
        self._lost = False

    def start(self) -> None:
        """Begin."""
        try:
            import tracemalloc
        except ImportError:
            raise CanNotTraceError("this Python has no tracemalloc") from None
        if tracemalloc.is_tracing():
            raise CanNotTraceError("tracemalloc runs already: the app, or PYTHONTRACEMALLOC, has started it")
        tracemalloc.start(DEPTH)
        self._started = True

    def stop(self) -> None:
        """End, and forget what was traced."""
        if self._started:
            import tracemalloc

            self._started, self._lost = False, True
            tracemalloc.stop()

    def alive(self) -> Iterator[Alive]:
        """Ask it."""
        if self._lost or not self._started:
            raise CanNotTraceError("what tracemalloc had traced was dropped when it had to end at once")
        import tracemalloc

        snapshot = tracemalloc.take_snapshot()
        self.stop()
        for found in snapshot.statistics("traceback"):
            # the most recent call is last
            stack = tuple(Frame(frame.filename, frame.lineno) for frame in reversed(found.traceback))
            yield Alive(found.size, found.count, stack)

    @property
    def memory(self) -> int | None:
        """What its tables hold."""
        if not self._started:
            return None
        import tracemalloc

        return tracemalloc.get_tracemalloc_memory()


def _in_a_thread(function: Callable[[], Any]) -> None:
    """Call it in a thread of its own, and wait for its end. Raises what it raises.

    memray knows the stacks that other threads have when it starts, but not that of the thread in which it is started: the frames there that
    return later count against those that are entered later, and whatever that thread allocates has a stack without callers, or none.
    """
    errors: list[BaseException] = []
    done = real("_thread", "allocate_lock")()
    done.acquire()

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    real("_thread", "start_new_thread")(run, ())
    done.acquire()
    if errors:
        raise errors[0]


def real(module: str, name: str) -> Any:
    """A function of Python's own: gevent replaces those that wait, and its own work in their own thread only."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return getattr(importlib.import_module(module), name) if monkey is None else monkey.get_original(module, name)


def library() -> tuple[str, ...]:
    """The folders of Python's own modules, of oomsafe and of memray: a line in them is nobody's leak."""
    found = [path for name in ("stdlib", "platstdlib") if (path := sysconfig.get_paths().get(name))]
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found += [entry.path for entry in os.scandir(ours) if entry.is_dir() and entry.name != "demo"]  # whose apps are apps
    with suppress(Exception):
        memray = sys.modules.get("memray")
        if memray is not None and memray.__file__:
            found.append(os.path.dirname(memray.__file__))
    return tuple(f"{os.path.normpath(path)}/" for path in found)
