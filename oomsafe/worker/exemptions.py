"""What the limit of kernel/rlimit.py must not hit: the starts of threads and of other processes.

A new thread needs address space for its stack, 8 MiB unless changed, of which it touches a few pages. All of it counts against the limit,
so a worker with little room could start no thread ("can't start new thread"), though there is memory for it. Worse, a thread that gets no
memory for its first frame never says that it has started, and Thread.start() waits for that forever (cpython#140746). So the limit is
raised by what a thread maps while it is started.

A new process inherits the limit that is in force when it is made. So the limit is suspended meanwhile: for 0.1 ms where the kernel need not
copy the parent's page tables (subprocess, posix_spawn), for 20 ms at a fork of 300 MiB. Code that runs without the GIL can pass it then.

What Python can't see is not exempt: threads and processes that C code starts (a libuv, gRPC or BLAS thread pool, system(3)), and functions
that other code took from these modules before, under a name of its own.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain, starmap
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from types import BuiltinFunctionType
from typing import Any

from oomsafe.kernel.rlimit import THREAD, DataLimit, thread_size
from oomsafe.log import failed

#: Ways to start a process, and where the function is found. _posixsubprocess.fork_exec makes the processes of subprocess, asyncio, and
#: multiprocessing's spawn and forkserver. os.fork, os.forkpty, multiprocessing's fork, gevent and uvloop run Python's hooks for forks.
PROCESSES = {
    "subprocess": (("_posixsubprocess", "fork_exec"), ("subprocess", "_fork_exec")),  # the second name since Python 3.11
    "os.posix_spawn": (("posix", "posix_spawn"), ("os", "posix_spawn")),
    "os.posix_spawnp": (("posix", "posix_spawnp"), ("os", "posix_spawnp")),
    "os.system": (("posix", "system"), ("os", "system")),
}

#: Likewise for threads. The joinable ones since Python 3.13; gevent's is that of its thread pool, the only threads it starts.
THREADS = (
    ("_thread", "start_new_thread"),
    ("_thread", "start_new"),
    ("_thread", "start_joinable_thread"),
    ("threading", "_start_new_thread"),
    ("threading", "_start_joinable_thread"),
    ("gevent.threadpool", "start_new_thread"),
)

#: Modules of the names above that other modules take functions from.
SOURCES = frozenset({"_posixsubprocess", "_thread", "posix", "os"})

#: What Python says when the system refuses a thread.
CAN_NOT_START = "can't start new thread"

#: Seconds for which the start of a thread at the limit is tried, and between two attempts. Where threads start, a server's main loop waits.
PATIENCE, PAUSE = 1.0, 0.02

_limit: DataLimit | None = None
_hooked = False
_replaced: list[tuple[Any, str, _Exempt]] = []
"""Module, name, and what stands there instead of the function."""


def install(limit: DataLimit) -> list[str]:
    """Exempt from `limit` what starts in this process, until remove() or a fork. Returns the ways of starting that could not be exempt.

    Called again, it takes another limit in its place, and exempts functions of modules that were imported since.
    """
    global _limit
    _limit = limit
    missing = [] if _hook() else ["os.fork"]
    missing += [way for way, places in PROCESSES.items() if not _replace(places, _ProcessStart)]
    missing += [] if _replace(THREADS, _ThreadStart) else ["threads"]
    return missing


def remove() -> None:
    """Undo install(). Where other code has put its own function over ours since, ours stays, and only calls what it replaced."""
    global _limit
    _limit = None
    for module, name, ours in _replaced:
        if getattr(module, name, None) is ours:
            setattr(module, name, ours.__wrapped__)
    _replaced.clear()


class _Exempt:
    """Stands in the place of a function, and is called like it. It is no function itself: like a built-in one, it binds to no class."""

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self.__wrapped__ = theirs
        self.__name__, self.__doc__ = theirs.__name__, theirs.__doc__

    @staticmethod
    def fits(theirs: object) -> bool:
        """Whether it may take the place of `theirs`."""
        return callable(theirs)


class _ProcessStart(_Exempt):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        limit = _limit
        if limit is None:
            return self.__wrapped__(*args, **kwargs)
        limit.suspend()
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            limit.resume()


class _ThreadStart(_Exempt):
    @staticmethod
    def fits(theirs: object) -> bool:
        """A function of gevent's starts a greenlet, which needs no stack; other code's calls the built-in one in the end."""
        return isinstance(theirs, BuiltinFunctionType)

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        limit = _limit
        if limit is None:
            return self.__wrapped__(function, *args, **kwargs)
        until, once_more = 0.0, True
        while True:
            try:
                return self._start(limit, function, args, kwargs)
            except (RuntimeError, MemoryError) as error:
                now = time.monotonic()
                until = until or now + PATIENCE
                # what was in the way may have been given back between the refusal and the check
                if now >= until or not (self._may_succeed(error, limit) or (once_more and not isinstance(error, _DiedEarly))):
                    raise
                once_more = False
            signal.sigtimedwait((), PAUSE)  # not time.sleep, which gevent replaces

    def _start(self, limit: DataLimit, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Start the thread with a ballast: memory that is mapped here, and unmapped by the new thread just before it calls the function.

        What is merely granted, others may take while the new thread waits for the GIL. A thread needs memory for its first Python frame, so
        it unmaps the ballast in a chain of calls in C, which allocates nothing. Raises what Python raises if it can't start a thread.
        """
        given, named = ((), {}) if self._joinable else (args[0] if args else None, args[1] if len(args) > 1 else {})
        if not callable(function) or not isinstance(given, tuple) or not isinstance(named, dict):
            return self.__wrapped__(function, *args, **kwargs)  # which refuses them
        started = _started_event(function)
        stack = thread_size() - THREAD
        before = limit.grant(stack + THREAD)
        try:
            ballast = _map(THREAD)
            calls = [starmap(ballast.close, [()]), starmap(partial(function, **named) if named else function, [given])]
            if not started:
                calls.insert(1, starmap(limit.withdraw, [(THREAD,)]))
            first = _First(any, chain(*calls))
            first.function = function
            there = weakref.ref(first)
            result = self.__wrapped__(first, *(args if self._joinable else ((),)), **kwargs)
        except BaseException:
            limit.withdraw(THREAD)
            raise
        finally:
            limit.withdraw(stack, before, THREAD)
        if started:
            del calls, first  # from here on the new thread alone has it, until it ends
            try:
                _wait(started, there)
            finally:
                limit.withdraw(THREAD)
        return result

    @property
    def _joinable(self) -> bool:
        return self.__name__ == "start_joinable_thread"

    def _may_succeed(self, error: Exception, limit: DataLimit) -> bool:
        """Whether the start may succeed if it is tried again: whoever is at the limit is refused, and gives back what he has, at once."""
        if isinstance(error, _DiedEarly) and self._joinable:
            return False  # Python starts the same handle only once
        return isinstance(error, MemoryError) or (str(error) == CAN_NOT_START and limit.is_close(thread_size()))


class _First(partial[Any]):
    """The first function of a thread. If it raises, Python names it."""

    function: Any

    def __repr__(self) -> str:
        return repr(self.function)


class _DiedEarly(RuntimeError):
    """A thread ended before it had said that it has started."""


def _started_event(function: Any) -> threading.Event | None:
    """What a threading.Thread sets when it runs, if `function` is what it runs first."""
    thread = getattr(function, "__self__", None)
    if not isinstance(thread, threading.Thread) or getattr(function, "__name__", "") != "_bootstrap":
        return None
    return getattr(thread, "_started", None)


def _map(size: int) -> mmap:
    try:
        return mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(CAN_NOT_START) from error


def _wait(started: threading.Event, first: weakref.ref[_First]) -> None:
    """Until the new thread runs, as Thread.start() does after us. Raises RuntimeError if it has ended before: that one waits forever."""
    while not started.is_set():
        try:
            started.wait(PAUSE)
        except MemoryError:
            signal.sigtimedwait((), PAUSE)
        if first() is None and not started.is_set():
            raise _DiedEarly(CAN_NOT_START)


def _replace(places: tuple[tuple[str, str], ...], kind: type[_Exempt]) -> bool:
    """Whether the function is replaced, in one of its places at least. One that is missing does not hinder the others."""
    done = False
    for module_name, name in places:
        try:
            # those that others take their functions from are imported; the rest only if the application uses them
            module = importlib.import_module(module_name) if module_name in SOURCES else sys.modules.get(module_name)
            theirs = getattr(module, name, None)
            if not isinstance(theirs, _Exempt) and kind.fits(theirs):
                assert theirs is not None
                ours = kind(theirs)
                setattr(module, name, ours)
                _replaced.append((module, name, ours))
            done = done or isinstance(getattr(module, name, None), kind)
        except Exception as error:
            failed(f"exempting {module_name}.{name} from the hard limit", "the worker", error)
    return done


def _hook() -> bool:
    """Have Python call us around its forks, from now on until the process ends: such hooks can't be removed."""
    global _hooked
    if not _hooked and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_fork)
        _hooked = True
    return _hooked


def _before_fork() -> None:
    if _limit is not None:
        _limit.suspend()


def _after_fork() -> None:
    if _limit is not None:
        _limit.resume()


def _in_fork() -> None:
    global _limit
    limit, _limit = _limit, None
    if limit is not None:
        limit.leave()
