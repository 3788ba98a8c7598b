"""Watches from the supervisor what its workers have in hand: a worker that is deep in C can't watch itself.

One thread, which sleeps while there is no work. It reads the ticket that each worker writes into its
slot while it runs a piece of work, and statm; it signals, and says nothing else to anybody.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from oomsafe.kernel.descendants import Descendants, Program, since_boot
from oomsafe.kernel.process import sizes_of
from oomsafe.kernel.target import Target
from oomsafe.log import attempt, log
from oomsafe.policy.ceilings import Ceiling, Step, judge
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.board import InHand, Scoreboard

#: What a worker is told by that the work in its hand is over its soft limit. macOS has no signals for real time; what it has is ignored
#: by who does not expect it.
TELL: int = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGINFO  # type: ignore[attr-defined]

#: Seconds between two looks at work without limits: what it held is all that is known of a worker that the kernel kills.
CASUAL = 0.1

#: Seconds between two looks at whether work that has limits has begun.
BEGINS = 0.01

#: Seconds until work that was told and has not heeded is told again; twice as many each time, for the signal may disturb what it calls.
#: CPython looks for signals between two bytecodes: one that comes after that look and before a blocking call's system call waits until
#: that call ends. Where the watcher's thread takes the GIL from who is about to block, they often come just then.
AGAIN = 0.02


def tell(work: InHand) -> None:
    """By a signal, which the worker's main thread hears."""
    try:
        with Target(work.pid, work.started) as worker:
            worker.send(TELL)
    except ProcessLookupError:
        pass  # it is gone


def _held(programs: list[Program]) -> int:
    return sum(program.held for program in programs)


def _end(programs: list[Program], work: InHand, used: int) -> None:
    """What has been started for work that is over would hold on to what that was stopped for."""
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


@dataclass
class _Watched:
    """One piece of work that has limits and has begun."""

    held: int
    """With what the programs hold that it has started."""
    at: float
    descendants: Descendants
    look_at: float = 0.0
    tell_at: float = 0.0
    """When it is to be told again; 0: it has not been told."""
    again: float = AGAIN


class Watcher:
    """`busy`: whether there is any work; `wanted`: whether the work with this ticket has not ended.

    `lasting` is told, by their tickets, of all work that is in hand for more than CASUAL, and by how many bytes it has grown.
    `tell` has the work's worker look at its slot: the work is over its soft limit. All four are called in its thread.
    """

    def __init__(
        self,
        board: Scoreboard,
        busy: Callable[[], bool],
        wanted: Callable[[int], bool],
        lasting: Callable[[dict[int, int]], None] = lambda _: None,
        dry_run: bool = False,
        tell: Callable[[InHand], None] = tell,
    ) -> None:
        self.stopped: dict[int, tuple[int, int]] = {}
        """Work that was stopped, by its ticket: the bytes that it used, and its limit. Whoever has heard of it removes it."""
        self.seen: dict[int, int] = {}
        """What each worker had resident when it was last seen with work, in bytes, by its generation."""
        self._board = board
        self._busy = busy
        self._wanted = wanted
        self._lasting = lasting
        self._held: dict[int, int] = {}
        """The same without file pages, which its limits don't count: the kernel drops clean ones by itself."""
        self._in_hand: set[int] = set()
        self._looked = since_boot()
        self._lasts_at = 0.0
        self._dry_run = dry_run
        self._tell = tell
        self._limited: dict[int, Ceiling] = {}
        self._watched: dict[int, _Watched] = {}
        self._poke = threading.Event()
        self._sleeps = math.inf
        self._ended = False
        self._thread: threading.Thread | None = None

    def watch(self, ticket: int, ceiling: Ceiling | None) -> None:
        """Work with this ticket is about to be handed out; `ceiling` None: it has no limits."""
        if ceiling is not None:
            self._limited[ticket] = ceiling
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="oomsafe-watcher", daemon=True)
            thread.start()  # where no thread can be had now, the next piece of work tries again
            self._thread = thread
        # not for each piece: it would take the GIL from whoever hands out the next
        if self._sleeps > (CASUAL if ceiling is None else BEGINS):
            self._poke.set()

    def end(self) -> None:
        """No work is watched from now on."""
        self._ended = True
        self._poke.set()
        if self._thread is not None:
            self._thread.join(1)

    def _run(self) -> None:
        while not self._ended:
            # from here on it is woken: what is handed out now may not be seen below
            self._sleeps = math.inf
            pause = CASUAL if self._busy() else None
            if self._limited:
                # what has not begun yet begins without telling
                pause = attempt("watching work", "the server", self._look) or CASUAL
            elif pause is not None:
                attempt("watching work", "the server", self._glance)
            if pause is not None:
                attempt("work that lasts", "the server", self._lasts)
            self._sleeps = math.inf if pause is None else pause
            self._poke.wait(pause)
            self._poke.clear()

    def _glance(self) -> None:
        for work in self._board.in_hand():
            self._measure(work)

    def _lasts(self) -> None:
        now = time.monotonic()
        if now >= self._lasts_at:
            self._lasts_at = now + CASUAL
            work = self._board.in_hand()
            before, self._in_hand = self._in_hand, {one.ticket for one in work}
            lasting = {one.ticket: max(0, self._held.get(one.generation, 0) - one.held) for one in work if one.ticket in before}
            if lasting:
                self._lasting(lasting)

    def _measure(self, work: InHand) -> int | None:
        """What its worker holds, in bytes; None when it is gone."""
        rss, held = sizes_of(work.pid) or (0, 0)
        if not rss:
            return None
        self.seen[work.generation], self._held[work.generation] = rss, held
        return held

    def _look(self) -> float:
        """Look at each piece of work that is due. Returns the seconds until the next is."""
        for ticket in [ticket for ticket in list(self._limited) if not self._wanted(ticket)]:
            self._limited.pop(ticket, None)
        for ticket in [ticket for ticket in self._watched if ticket not in self._limited]:
            del self._watched[ticket]
        pause, running = CASUAL, 0
        looked, self._looked = self._looked, since_boot()
        for work in self._board.in_hand():
            ceiling = self._limited.get(work.ticket)
            if ceiling is None:
                self._measure(work)
                continue
            running += 1
            if work.ticket not in self._watched:
                # it has begun since the last look; what was started before that is not its
                self._watched[work.ticket] = _Watched(work.held, time.monotonic() - BEGINS, Descendants(work.pid, looked))
            pause = min(pause, self._look_at(work, ceiling, self._watched[work.ticket]))
        return min(pause, BEGINS) if running < len(self._limited) else pause

    def _look_at(self, work: InHand, ceiling: Ceiling, watched: _Watched) -> float:
        now = time.monotonic()
        if now < watched.look_at:
            return watched.look_at - now
        held = self._measure(work)
        if held is None:
            return CASUAL  # it is gone
        held += _held(watched.descendants.look())
        told = watched.tell_at > 0 and (now < watched.tell_at or self._board.has_heeded(work.number, work.generation, work.ticket))
        look = judge(ceiling, work.held, held, (held - watched.held) / max(0.0001, now - watched.at), told)
        watched.held, watched.at, watched.look_at = held, now, now + look.again
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

        Between a look at its ticket and the signal it might end this work and begin the next, or hold a
        lock that it shares with other workers while it hands its result over. So it is made to stand
        still first: it has the ticket in its slot only while it is inside the work, and then it can't lose it any more.
        """
        try:
            with Target(work.pid, work.started) as worker:
                try:
                    worker.stop()
                    programs = descendants.look()  # now, while they are its descendants
                    look = judge(ceiling, work.held, (self._measure(work) or 0) + _held(programs), 0, True)
                    if look.step is Step.STOP and self._board.hand(work.number, work.generation)[0] == work.ticket:
                        self.stopped[work.ticket] = (look.used, look.limit or 0)
                        worker.send(signal.SIGKILL)
                        self._limited.pop(work.ticket, None)
                        _end(programs, work, look.used)
                finally:
                    worker.send(signal.SIGCONT)
        except ProcessLookupError:
            pass  # it is gone
