"""A fork of this process that looks at it while it goes on: whatever happens in the fork, the process itself is as it was.

What a fork could do to the process that it comes from, and what is done about it:

- It shares the process's sockets, locks of files and pipes. It closes its own copy of every descriptor before it does anything else.
- Python destroys in the fork what other threads have in threading.local (PyOS_AfterFork_Child), and so calls finalizers, before anything
  here runs, that may write to these sockets: mysqlclient's would end the session with its server. So those objects are held until the
  fork is done. What other threads have in a ContextVar, set outside of any Context.run(), can't be found, and is destroyed.
- It inherits handlers of signals, and the descriptor that asyncio is woken by. So all signals are blocked until their handlers are reset.
- It might collect garbage, or hang where another thread had a lock: garbage collection is off, and an alarm ends it.
- Copies of pages take memory: the kernel kills the fork before any other process.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not signal, some functions of which gevent replaces
import gc
import os
import posix
import sys
import time
from _thread import _local
from collections.abc import Callable
from types import FunctionType
from typing import NoReturn

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.handles import own_handles
from oomsafe.kernel.oom_score import write_score
from oomsafe.kernel.process import is_alive, start_of_child
from oomsafe.policy.readers import SCORE_MAX

#: The exit status of a fork that has come to its end.
DONE = 0

#: The status of a fork that the application has reaped.
UNKNOWN = 256


class Fork:
    """The fork, as this process sees it."""

    def __init__(self, pid: int, stopped: float) -> None:
        self.pid = pid
        self.stopped = stopped
        """For how many seconds this process stood still."""
        self._started = start_of_child(pid)

    def status(self) -> int | None:
        """How it has ended, as os.waitstatus_to_exitcode() says it, or UNKNOWN; None: it has not. It is reaped, and no other child is."""
        try:
            pid, status = posix.waitpid(self.pid, posix.WNOHANG)  # the module's own: gevent and eventlet replace that of `os`
        except ChildProcessError:  # the application reaps all its children, or ignores SIGCHLD
            return UNKNOWN
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        """End it at once; it is to be reaped all the same."""
        if self._started is not None and is_alive(self.pid, self._started):
            try:
                os.kill(self.pid, _signal.SIGKILL)
            except ProcessLookupError:
                pass


def fork(run: Callable[[], None], seconds: float) -> Fork:
    """Fork this process, and call `run` in the fork, which ends after that, or after so many seconds at the latest.

    Handlers that the application has registered for forks (os.register_at_fork) are called, as in any os.fork(). Raises OSError if the
    kernel refuses: RLIMIT_NPROC, the pids of a cgroup, memory.
    """
    held = _of_other_threads()
    collects = gc.isenabled()
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    began = time.monotonic()
    try:
        gc.disable()
        pid: int = _quiet_fork()
        if not pid:
            _be_a_fork(run, seconds)
        return Fork(pid, time.monotonic() - began)
    finally:
        if collects:
            gc.enable()
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        held.clear()


def _of_other_threads() -> list[object]:
    """The dictionaries that threading.local has for each thread. Takes 30 ms with 2 million objects, and writes to none of them."""
    if own_handles().threads == 1:
        return []
    kinds: list[type] = [_local]
    for kind in kinds:
        kinds.extend(type.__subclasses__(kind))
    found: list[object] = []
    for each in gc.get_referrers(*kinds):
        if issubclass(type(each), _local):
            for inner in gc.get_referents(each):
                if type(inner) is dict:  # by thread (Modules/_threadmodule.c, local_traverse)
                    found += [inner, *dict.values(inner)]
    return found


def _call() -> int:
    return fork_of_python()  # type: ignore[name-defined,no-any-return]  # noqa: F821


#: os.fork() as Python has it: that of gevent would begin its hub anew in the fork. In a process with threads Python 3.12 and later warn
#: of it, by the name of the module that calls it; they say nothing if it has none (Python/_warnings.c, warn_explicit).
_quiet_fork = FunctionType(_call.__code__, {"fork_of_python": posix.fork, "__name__": None})


def _be_a_fork(run: Callable[[], None], seconds: float) -> NoReturn:
    """In the fork. It never returns."""
    status = 1
    try:
        gc.disable()  # again: a handler of the application's may have enabled it
        sys.settrace(None)
        sys.setprofile(None)
        _signal.set_wakeup_fd(-1)
        for number in _signal.valid_signals():
            try:
                _signal.signal(number, _signal.SIG_DFL)
            except OSError:  # SIGKILL, SIGSTOP
                pass
        _signal.setitimer(_signal.ITIMER_REAL, seconds)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        _close_everything()
        try:
            write_score(SCORE_MAX)
        except ScoreRefused:
            pass  # its worker has changed its user: then nobody but root can
        run()
        status = DONE
    finally:
        posix._exit(status)  # at once: nothing that the process had not written yet is written twice


def _close_everything() -> None:
    """Every descriptor; standard input, output and error are /dev/null from now on."""
    for each in os.listdir("/proc/self/fd"):
        try:
            os.close(int(each))
        except OSError:  # the one by which the folder was read
            pass
    null = os.open(os.devnull, os.O_RDWR)
    for number in {0, 1, 2} - {null}:
        os.dup2(null, number)
