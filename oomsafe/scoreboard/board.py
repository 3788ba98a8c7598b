"""The scoreboard: what the processes of one pool know of each other, in one shared mapping (see layout.py).

The supervisor makes it (see backing.py); workers inherit the mapping over their fork. It survives its
writers' SIGKILL, and anyone who may read its file reads the whole pool from it.

Workers may be of another user than their supervisor, so that one believes nothing that stands there and could hurt: who has
which slot, the generations and the totals it keeps for itself, and writes them for others to read.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from oomsafe.log import log
from oomsafe.scoreboard import backing, layout, places
from oomsafe.scoreboard.backing import Backing
from oomsafe.scoreboard.header import Header
from oomsafe.scoreboard.lock import Kept, PoolLock
from oomsafe.scoreboard.roll import Entry, Others, Roll
from oomsafe.scoreboard.tenants import Tenants
from oomsafe.scoreboard.tickets import InHand, Tickets

if TYPE_CHECKING:
    from oomsafe.scoreboard.reader import Reader
    from oomsafe.scoreboard.view import PoolView

__all__ = ["Entry", "InHand", "Others", "Scoreboard"]


class Scoreboard:
    """One pool's shared memory. Made by create() or joined by join(); close() when done.

    What is done with its slots stands in three files: who has which (tenants.py), what the workers do (roll.py), and the work that they
    are inside of (tickets.py).
    """

    def __init__(self, where: Backing, memory: mmap.mmap, supervisor: int = 0) -> None:
        """`supervisor` is this process's pid, if it is the one."""
        self.path = where.path
        """None where no folder could hold it: then only the pool itself can read it."""
        self._mmap = memory
        self._memory = memoryview(memory)
        self._owner = supervisor
        self._file = Kept(where.file, where.path)
        self._named = None if where.memory == where.file else Kept(where.memory, None)
        """What the file names: those who read it from outside need it to be open."""
        self._text = where.text
        self._lock = PoolLock(self._file)
        self.header = Header(self._memory, self._lock)
        self._tenants = tenants = Tenants(self._memory, self.header, partial(_enlarge, self._named or self._file), supervisor)
        self.reserve, self.born, self.release, self.slot = tenants.reserve, tenants.born, tenants.release, tenants.slot
        roll = Roll(self._memory, self.header, tenants)
        self.roll, self.states, self.others, self.silent = roll.call, roll.states, roll.others, roll.silent
        self.saw, self.give_order = roll.saw, roll.give_order
        tickets = Tickets(self._memory, tenants)
        self.in_hand, self.hand = tickets.in_hand, tickets.hand
        self.tell_of_limit, self.has_heeded = tickets.tell_of_limit, tickets.has_heeded

    @classmethod
    def create(cls, workers: int, server: str) -> tuple[Scoreboard, list[str]]:
        """A new scoreboard of this process's pool, and warnings to log when it could not lie where it should.

        It has slots for twice the workers and some more, for replacements and for SIGTTIN, and grows beyond that.
        """
        size, header = backing.blank(min(max(32, 2 * workers + 8), layout.SLOTS_MAX), workers, server)
        where, warnings = backing.allocate(size, header, layout.SIZE_MAX)
        return cls(where, mmap.mmap(where.memory, 0), os.getpid()), warnings  # as long as it is

    @property
    def address(self) -> str:
        """By which a process that is spawned finds it, for join(): its path, or the name of its memory."""
        return self.path or self._text.decode()

    @property
    def descriptor(self) -> int | None:
        """The descriptor of the shared bytes, for a process that inherits it and reads by Reader.inherited(); None: it was closed."""
        return (self._named or self._file).get()

    @classmethod
    def private(cls, slots: int = 1) -> Scoreboard:
        """One that only this process sees, and what it forks."""
        size, header = backing.blank(slots, slots, "")
        fd = backing.in_memory(size, header, size)
        return cls(Backing(fd, fd, None), mmap.mmap(fd, size), os.getpid())

    @classmethod
    def join(cls, address: str) -> Scoreboard:
        """In a spawned worker: its pool's scoreboard. Raises ScoreboardError when it is none."""
        return cls(*backing.join(address))

    @staticmethod
    def open(path: str) -> Reader:
        """Another process's scoreboard, to read. Raises ScoreboardError when it is none."""
        from oomsafe.scoreboard.reader import Reader  # here: a worker reads its own

        return Reader(path)

    @staticmethod
    def look(path: str) -> PoolView:
        """One look at another process's scoreboard. Raises ScoreboardError when it is none."""
        with Scoreboard.open(path) as board:
            return board.read()

    @property
    def slots(self) -> int:
        """How many there are: the supervisor makes more when it needs them."""
        return self._tenants.slots

    @property
    def has_room(self) -> bool:
        """Whether a slot is left for one more worker."""
        return self._tenants.has_room

    @property
    def pids(self) -> list[int]:
        """In the supervisor: of the workers that it has started, or that have said which they are; not all need live."""
        return self._tenants.pids

    @property
    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of the workers that born() was told of and that have claimed their slot, for the supervisor to act on."""
        return self._tenants.processes

    def read(self) -> PoolView:
        """The whole pool, as one consistent copy."""
        from oomsafe.scoreboard.view import read_pool  # here: most workers are never asked

        self._tenants.learn()
        if os.getpid() != self._owner:
            return read_pool(self._fetch, self.slots)
        return replace(read_pool(self._fetch, self.slots, self._tenants.identity), supervisor=self._owner)

    def _fetch(self, at: int, length: int) -> bytes:
        return self._memory[at : at + length].tobytes()

    def try_lock(self) -> bool:
        """Keep all other workers and threads from taking a turn until unlock(); the thread that has it may have it again.

        False: somebody else has it, try again soon.
        """
        return self._lock.try_acquire()

    def unlock(self) -> None:
        """Let others take a turn. Raises RuntimeError in a thread that does not have it."""
        self._lock.release()

    def mend(self) -> None:
        """In the supervisor, now and then: the application around it may have closed what must be open."""
        if self.path is None or os.getpid() != self._owner:
            return
        was_open = self._file.is_open
        file = self._file.get()
        if file is not None and not was_open:
            places.hold(file)
        if file is not None and self._text and os.pread(file, 64, 0) != self._text:  # a worker has it open, too
            os.pwrite(file, self._text, 0)
            os.ftruncate(file, len(self._text))
        if self._named is not None and not self._named.is_open:
            self._named = None
            log.warning("the application has closed the scoreboard's descriptor: `oomsafe status` can't see this pool any more")

    def remove(self) -> None:
        """Remove the file; the mapping stays for those who have it. Only its supervisor does."""
        if self.path and os.getpid() == self._owner:
            try:
                os.unlink(self.path)
            except OSError:
                pass  # the folder was cleaned by somebody else
            self.path = None

    def close(self) -> None:
        """Let go of the mapping. Slots that were handed out must not be used any more."""
        self._memory.release()
        self._mmap.close()
        for kept in filter(None, (self._file, self._named)):
            kept.close()


def _enlarge(memory: Kept, size: int) -> bool:
    """Whether there are so many bytes of it now."""
    fd = memory.get()
    if fd is None:
        return False
    try:
        backing.enlarge(fd, size)
    except OSError:
        return False
    return True
