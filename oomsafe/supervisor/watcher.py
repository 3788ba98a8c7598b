"""Holds the work that workers have in hand to its limits, from the supervisor: a worker that is deep in C can't watch itself.

`Watcher` knows what is due and has neither thread nor clock; `WatcherThread` calls it where the server's own loop can't do so every few
milliseconds. Both read the ticket that each worker writes into its slot while it runs a piece of work, and its statm.
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
from oomsafe.policy.ceilings import Ceiling, Step, judge
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.board import InHand, Scoreboard

#: The signal for a worker whose work is over its soft limit. macOS has no real-time signals; a process that does not expect SIGINFO
#: ignores it.
TELL: int = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGINFO  # type: ignore[attr-defined]

#: Seconds between two measurements of work without limits: what it held is all that is known of a worker that the kernel kills.
CASUAL = 0.1

#: Seconds between two checks whether work that has limits has begun.
BEGINS = 0.01

#: Seconds until a worker that has not heeded the signal gets it again; twice as many each time, for it may disturb what the work calls.
#: CPython asks for signals between two bytecodes: one that comes after that, and before a blocking call's system call, waits until that
#: call ends. Where the watcher's thread takes the GIL from a worker that is about to block, they often come just then.
AGAIN = 0.02


def tell(work: InHand) -> None:
    """Signal the worker's main thread to read in its slot that its work is over the soft limit."""
    try:
        with Target(work.pid, work.started) as worker:
            worker.send(TELL)
    except ProcessLookupError:
        pass  # it is gone


def kill_if(pid: int, started: int, is_over: Callable[[], bool]) -> bool:
    """Kill this process if `is_over` still holds while it stands still. Returns whether it was killed.

    Between a measurement and the signal a worker might end this work and begin the next, or take a lock that it shares with other
    workers to hand its result over. So it is made to stand still first: then what `is_over` finds can't change before the kill.
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
        pass  # it is gone, by this very signal or before it
    return killed


def _held(programs: list[Program]) -> int:
    return sum(program.held for program in programs)


def _end(programs: list[Program], work: InHand, used: int) -> None:
    """End what the work has started: it would hold on to the memory that the work was stopped for."""
    for program in programs:
        try:
            with Target(program.pid, program.started) as one:
                one.send(signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it is gone, or another user's
    if programs:
        biggest = max(programs, key=lambda program: program.held)
        log.warning(
            "of the %s that the work of worker %d used, %s were held by programs that it had started, and that are ended with it: "
            "%d, the biggest %s (%d)", format_size(used), work.pid, format_size(_held(programs)), len(programs),
            printable(biggest.name), biggest.pid,
        )  # fmt: skip


class Stopped(NamedTuple):
    """Work whose worker was killed for it. Sizes in bytes."""

    ticket: int
    used: int
    """As its limits count it."""
    limit: int


@dataclass
class _Watched:
    """One piece of work that has limits and has begun."""

    held: int
    """Bytes at the last measurement, with what the programs hold that it has started."""
    at: float
    """When that was."""
    descendants: Descendants
    due: float = 0.0
    """When it is to be measured again."""
    tell_at: float = 0.0
    """When its worker is to be signalled again; 0: it has not been yet."""
    again: float = AGAIN


class Watcher:
    """Measures the work in hand, and enforces its limits. Its caller brings the clock: check(now) does what is due.

    `busy`: whether any work is handed out; `wanted`: whether the work with this ticket has not ended. `lasting` gets, by their tickets,
    all pieces of work that have been in hand for more than CASUAL, and by how many bytes each has grown. `tell` makes a worker read in its
    slot that its work is over the soft limit. All four are called from check(). `sizes` of a pid: (rss, the same without file pages).
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
        """Workers that were killed for their work, by their generation, until forget()."""
        self._board = board
        self._busy = busy
        self._wanted = wanted
        self._lasting = lasting
        self._measured: dict[int, tuple[int, int]] = {}
        """(rss, the same without file pages, which its limits don't count) of each worker when it was last measured, by generation."""
        self._in_hand: set[int] = set()
        self._checked = since_boot()
        self._lasts_at = 0.0
        self._dry_run = dry_run
        self._tell = tell
        self._sizes = sizes
        self._limited: dict[int, Ceiling] = {}
        self._watched: dict[int, _Watched] = {}

    def watch(self, ticket: int, ceiling: Ceiling | None) -> float:
        """Work with this ticket is about to be handed out; `ceiling` None: it has no limits. Returns within how many seconds to check()."""
        if ceiling is None:
            return CASUAL
        self._limited[ticket] = ceiling
        return BEGINS

    def check(self, now: float) -> float:
        """Do what is due at `now`, in seconds on the monotonic clock. Returns the seconds until more is; inf: once work is handed out."""
        pause = CASUAL if self._busy() else math.inf
        if self._limited:
            # a worker does not announce that it begins
            pause = attempt("watching work", "the server", partial(self._enforce, now)) or CASUAL
        elif pause < math.inf:
            attempt("watching work", "the server", self._measure_all)
        if pause < math.inf:
            attempt("work that lasts", "the server", partial(self._report_lasting, now))
        return pause

    def forget(self, generation: int) -> tuple[int | None, Stopped | None]:
        """Once a worker is gone: its rss in bytes when it was last measured, and the work that it was killed for; None: never, and none."""
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
        """What its worker holds, in bytes; None when it is gone."""
        sizes = self._sizes(work.pid)
        if sizes is None or not sizes[0]:
            return None
        self._measured[work.generation] = sizes
        return sizes[1]

    def _enforce(self, now: float) -> float:
        """Measure each piece of work that is due. Returns the seconds until the next is."""
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
                # it has begun since the last check; what was started before that is not its
                self._watched[work.ticket] = _Watched(work.held, now - BEGINS, Descendants(work.pid, before))
            pause = min(pause, self._hold_to(ceiling, work, self._watched[work.ticket], now))
        return min(pause, BEGINS) if running < len(self._limited) else pause

    def _hold_to(self, ceiling: Ceiling, work: InHand, watched: _Watched, now: float) -> float:
        """Returns the seconds until this piece of work is due again."""
        if now < watched.due:
            return watched.due - now
        held = self._measure(work)
        if held is None:
            return CASUAL  # it is gone
        held += _held(watched.descendants.look())
        told = watched.tell_at > 0 and (now < watched.tell_at or self._board.has_heeded(work.number, work.generation, work.ticket))
        look = judge(ceiling, work.held, held, (held - watched.held) / max(0.0001, now - watched.at), told)
        watched.held, watched.at, watched.due = held, now, now + look.again
        if look.step is not Step.LEAVE and self._dry_run:
            self._limited.pop(work.ticket, None)
            log.warning("a limit would be met (dry run): %s > %s, worker %d", format_size(look.used), format_size(look.limit), work.pid)
        elif look.step is Step.TELL:
            if not watched.tell_at:
                # the ticket goes with the signal: one that comes when the next piece of work has begun is none of its business
                self._board.tell_of_limit(work.number, work.generation, work.ticket, look.used, look.limit or 0)
            watched.tell_at, watched.again = now + watched.again, watched.again * 2
            self._tell(work)
        elif look.step is Step.STOP:
            self._stop(work, ceiling, watched.descendants)
        return look.again

    def _stop(self, work: InHand, ceiling: Ceiling, descendants: Descendants) -> None:
        """Kill the worker, if it still has this very work in hand, and then what it has started for that.

        A worker has the ticket in its slot only while it is inside the work: one that stands still there can't put it down any more.
        """
        programs: list[Program] = []
        used = 0

        def is_over() -> bool:
            nonlocal used
            programs.extend(descendants.look())  # now, while they are its descendants
            look = judge(ceiling, work.held, (self._measure(work) or 0) + _held(programs), 0, True)
            used = look.used
            if look.step is not Step.STOP or self._board.hand(work.number, work.generation)[0] != work.ticket:
                return False
            self.stopped[work.generation] = Stopped(work.ticket, used, look.limit or 0)  # before the kill: whoever reaps it asks
            return True

        if kill_if(work.pid, work.started, is_over):
            self._limited.pop(work.ticket, None)
            _end(programs, work, used)


class WatcherThread:
    """Calls a watcher's check() as often as it asks for; sleeps while no work is handed out."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self._poke = threading.Event()
        self._sleeps = math.inf
        self._ended = False
        self._thread: threading.Thread | None = None

    def watch(self, ticket: int, ceiling: Ceiling | None) -> None:
        """Work with this ticket is about to be handed out; `ceiling` None: it has no limits. Raises RuntimeError: no thread can be had."""
        due = self.watcher.watch(ticket, ceiling)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="oomsafe-watcher", daemon=True)
            thread.start()  # where no thread can be had now, the next piece of work tries again
            self._thread = thread
        # not for each piece: it would take the GIL from whoever hands out the next
        if self._sleeps > due:
            self._poke.set()

    def end(self) -> None:
        """No work is watched from now on."""
        self._ended = True
        self._poke.set()
        if self._thread is not None:
            self._thread.join(1)

    def _run(self) -> None:
        while not self._ended:
            # from here on watch() wakes it: what is handed out now may be missed below
            self._sleeps = math.inf
            pause = self._sleeps = self.watcher.check(time.monotonic())
            self._poke.wait(None if pause == math.inf else pause)
            self._poke.clear()
