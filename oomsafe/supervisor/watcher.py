"""Enforces the limits of running work from the supervisor, because a worker that is deep in C code can't watch itself.

`Watcher` knows what is due and has neither thread nor clock; `WatcherThread` calls it if the server's own loop can't do so every few
milliseconds. It reads the ticket that each worker writes into its slot while it runs a piece of work, and the worker's statm.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from oomsafe.kernel.descendants import Descendants, Program, since_boot
from oomsafe.kernel.process import sizes_of
from oomsafe.kernel.target import Target
from oomsafe.log import attempt, log
from oomsafe.policy.ceilings import Act, Ceiling, judge
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.board import InHand, Scoreboard

#: The signal for a worker whose work is over its soft limit. macOS has no real-time signals, so there it is SIGINFO, which a process
#: without a handler ignores.
TELL: int = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGINFO  # type: ignore[attr-defined]

#: Seconds between two measurements of work without limits: if the kernel kills its worker, the last figure is all that is known of it.
CASUAL = 0.1

#: Seconds between two checks of whether work with limits has begun.
BEGINS = 0.01

#: Seconds until a worker that has not heeded the signal gets it again, doubled each time because the signal may disturb the work's calls.
#: CPython checks for signals between two bytecodes: a signal that arrives after that check and before a blocking system call is handled
#: only when that call ends. If the watcher's thread takes the GIL from a worker that is about to block, signals often arrive just then.
AGAIN = 0.02

#: A worker whose kernel refuses its work more memory at the limit is signalled each time the work has grown by this part of the limit. The
#: kernel counts what is mapped, and much of that is never touched (stacks of threads, buffers of libraries): the worker takes it out again.
STEPS = 8


def tell(work: InHand) -> None:
    """Signal the worker's main thread. It reads in its slot that its work is over the soft limit, or measures what that has left."""
    try:
        with Target(work.pid, work.started) as worker:
            worker.send(TELL)
    except ProcessLookupError:
        pass  # the worker is gone


def kill_if(pid: int, started: int, is_over: Callable[[], bool]) -> bool:
    """Stop this process, and kill it if `is_over()` is still true then. Returns whether it was killed.

    Between a measurement and the signal, a worker might end this work and begin the next, or take a lock that it shares with other
    workers to deliver its result. So the process is stopped first: then the result of `is_over` can't change before the kill.
    """
    killed = False
    try:
        with Target(pid, started) as process:
            try:
                process.stop()
                if is_over():
                    process.send(signal.SIGKILL)
                    killed = True
            finally:
                process.send(signal.SIGCONT)
    except ProcessLookupError:
        pass  # the process is gone, by this signal or already before it
    return killed


def _held(programs: list[Program]) -> int:
    return sum(program.held for program in programs)


def _end(programs: list[Program], work: InHand, used: int) -> None:
    """End the programs that the work has started: they would keep the memory that the work was stopped for."""
    for program in programs:
        try:
            with Target(program.pid, program.started) as one:
                one.send(signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # the program is gone, or runs as another user
    if programs:
        biggest = max(programs, key=lambda program: program.held)
        log.warning(
            "of the %s that the work of worker %d used, %s were held by programs that it had started, and that are ended with it: "
            "%d, the biggest %s (%d)", format_size(used), work.pid, format_size(_held(programs)), len(programs),
            printable(biggest.name), biggest.pid,
        )  # fmt: skip


class Stopped(NamedTuple):
    """Work for which its worker was killed. Sizes in bytes."""

    ticket: int
    used: int
    """What it used, as its limits count that."""
    limit: int


@dataclass
class _Watched:
    """A piece of work with limits that has begun. Times on the clock of check()."""

    held: int
    """Bytes at the last measurement, including the programs that it has started."""
    at: float
    """When it was last measured."""
    descendants: Descendants
    due: float = 0.0
    """When it must be measured again."""
    warn_at: float = 0.0
    """When its worker must be signalled again; 0: the worker has not been signalled yet."""
    again: float = AGAIN
    measured_at: int = 0
    """Bytes that it used when its worker was last signalled to measure again what the kernel may still give it."""


class Watcher:
    """Measures running work, and enforces its limits. The caller provides the clock: check(now) does what is due.

    `busy()`: whether any work is handed out; `wanted(ticket)`: whether the work with this ticket has not ended. `lasting` gets all pieces
    of work that have been running for more than CASUAL: by ticket, the bytes by which each has grown. `tell` makes a worker read in its
    slot that its work is over the soft limit. All four are called from check(). `sizes(pid)` returns (rss, rss without file pages).
    """

    def __init__(
        self,
        board: Scoreboard,
        busy: Callable[[], bool],
        wanted: Callable[[int], bool],
        lasting: Callable[[dict[int, int]], None] = lambda _: None,
        dry_run: bool = False,
        tell: Callable[[InHand], None] = tell,
        sizes: Callable[[int], tuple[int, int] | None] = sizes_of,
    ) -> None:
        self.stopped: dict[int, Stopped] = {}
        """The work for which workers were killed, by the worker's generation, until forget()."""
        self._board = board
        self._busy = busy
        self._wanted = wanted
        self._lasting = lasting
        self._measured: dict[int, tuple[int, int]] = {}
        """(rss, rss without file pages, which the limits don't count) of each worker when it was last measured, by generation."""
        self._in_hand: set[int] = set()
        self._checked = since_boot()
        self._lasts_at = 0.0
        self._dry_run = dry_run
        self._tell = tell
        self._sizes = sizes
        self._limited: dict[int, Ceiling] = {}
        self._watched: dict[int, _Watched] = {}

    def watch(self, ticket: int, ceiling: Ceiling | None) -> float:
        """Work with this ticket is handed out; `ceiling` None: it has no limits. Returns the seconds within which to call check()."""
        if ceiling is None:
            return CASUAL
        self._limited[ticket] = ceiling
        return BEGINS

    def check(self, now: float) -> float:
        """Do what is due at `now`, seconds on the monotonic clock. Returns seconds until the next call; inf: when work is handed out."""
        pause = CASUAL if self._busy() else math.inf
        if self._limited:
            # a worker does not announce that it begins a piece of work
            pause = attempt("watching work", "the server", partial(self._enforce, now)) or CASUAL
        elif pause < math.inf:
            attempt("watching work", "the server", self._measure_all)
        if pause < math.inf:
            attempt("work that lasts", "the server", partial(self._report_lasting, now))
        return pause

    def forget(self, generation: int) -> tuple[int | None, Stopped | None]:
        """Once a worker is gone: (its last measured rss in bytes, the work for which it was killed); None: never measured, not killed."""
        rss, _ = self._measured.pop(generation, (None, None))
        return rss, self.stopped.pop(generation, None)

    def _measure_all(self) -> None:
        for work in self._board.in_hand():
            self._measure(work)

    def _report_lasting(self, now: float) -> None:
        if now >= self._lasts_at:
            self._lasts_at = now + CASUAL
            work = self._board.in_hand()
            before, self._in_hand = self._in_hand, {one.ticket for one in work}
            lasting = {one.ticket: max(0, self._measured.get(one.generation, (0, 0))[1] - one.held) for one in work if one.ticket in before}
            if lasting:
                self._lasting(lasting)

    def _measure(self, work: InHand) -> int | None:
        """What the work's worker holds without file pages, in bytes; None if the worker is gone."""
        sizes = self._sizes(work.pid)
        if sizes is None or not sizes[0]:
            return None
        self._measured[work.generation] = sizes
        return sizes[1]

    def _enforce(self, now: float) -> float:
        """Measure each piece of work that is due. Returns the seconds until the next one is due."""
        for ticket in [ticket for ticket in list(self._limited) if not self._wanted(ticket)]:
            self._limited.pop(ticket, None)
        for ticket in [ticket for ticket in self._watched if ticket not in self._limited]:
            del self._watched[ticket]
        pause, running = CASUAL, 0
        before, self._checked = self._checked, since_boot()
        for work in self._board.in_hand():
            ceiling = self._limited.get(work.ticket)
            if ceiling is None:
                self._measure(work)
                continue
            running += 1
            if work.ticket not in self._watched:
                # it has begun since the last check, so programs that were started before that do not belong to it
                self._watched[work.ticket] = _Watched(work.held, now - BEGINS, Descendants(work.pid, before))
            pause = min(pause, self._hold_to(ceiling, work, self._watched[work.ticket], now))
        return min(pause, BEGINS) if running < len(self._limited) else pause

    def _hold_to(self, ceiling: Ceiling, work: InHand, watched: _Watched, now: float) -> float:
        """Measure this piece of work if it is due, and enforce its limits. Returns the seconds until it is due again."""
        if now < watched.due:
            return watched.due - now
        held = self._measure(work)
        if held is None:
            return CASUAL  # the worker is gone
        held += _held(watched.descendants.measure())
        warned = watched.warn_at > 0 and (now < watched.warn_at or self._board.has_heeded(work.number, work.generation, work.ticket))
        ruling = judge(ceiling, work.held, held, (held - watched.held) / max(0.0001, now - watched.at), warned)
        watched.held, watched.at, watched.due = held, now, now + ruling.again
        if ruling.act is not Act.LEAVE and self._dry_run:
            self._limited.pop(work.ticket, None)
            log.warning("a limit would be met (dry run): %s > %s, worker %d", format_size(ruling.used), format_size(ruling.limit), work.pid)
        elif ruling.act is Act.TELL:
            if not watched.warn_at:
                # with the ticket, so that a signal that arrives when the next piece of work has begun is ignored
                self._board.tell_of_limit(work.number, work.generation, work.ticket, ruling.used, ruling.limit or 0)
            watched.warn_at, watched.again = now + watched.again, watched.again * 2
            self._tell(work)
        elif ruling.act is Act.STOP:
            self._stop(work, ceiling, watched.descendants)
        elif ceiling.spare and ceiling.hard is not None and abs(ruling.used - watched.measured_at) > ceiling.hard // STEPS:
            watched.measured_at = ruling.used
            self._tell(work)
        return ruling.again

    def _stop(self, work: InHand, ceiling: Ceiling, descendants: Descendants) -> None:
        """Kill the worker if it is still inside this work, and then the programs that the work has started.

        A worker has the ticket in its slot only while it is inside the work; once it is stopped there, it can't leave the work any more.
        """
        programs: list[Program] = []
        used = 0

        def is_over() -> bool:
            nonlocal used
            programs.extend(descendants.measure())  # now, while they are still its descendants
            ruling = judge(ceiling, work.held, (self._measure(work) or 0) + _held(programs), 0, True)
            used = ruling.used
            if ruling.act is not Act.STOP or self._board.hand(work.number, work.generation)[0] != work.ticket:
                return False
            self.stopped[work.generation] = Stopped(work.ticket, used, ruling.limit or 0)  # before the kill: it is read on reaping
            return True

        if kill_if(work.pid, work.started, is_over):
            self._limited.pop(work.ticket, None)
            _end(programs, work, used)


class WatcherThread:
    """Calls a watcher's check() as often as its return value says; sleeps while no work is handed out."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self._poke = threading.Event()
        self._sleeps = math.inf
        self._ended = False
        self._thread: threading.Thread | None = None

    def watch(self, ticket: int, ceiling: Ceiling | None) -> None:
        """Work with this ticket is handed out; `ceiling` None: it has no limits. Raises RuntimeError if the thread can't be started."""
        due = self.watcher.watch(ticket, ceiling)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="oomsafe-watcher", daemon=True)
            thread.start()  # if no thread can be started now, the next piece of work tries again
            self._thread = thread
        # not for each piece of work, because waking the thread takes the GIL from the one that hands out the next
        if self._sleeps > due:
            self._poke.set()

    def end(self) -> None:
        """Stop watching, and end the thread."""
        self._ended = True
        self._poke.set()
        if self._thread is not None:
            self._thread.join(1)

    def _run(self) -> None:
        while not self._ended:
            # from here on watch() wakes this thread, because the check below may miss work that is handed out now
            self._sleeps = math.inf
            pause = self._sleeps = self.watcher.check(time.monotonic())
            self._poke.wait(None if pause == math.inf else pause)
            self._poke.clear()
