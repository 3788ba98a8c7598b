"""The scoreboard: what the processes of one pool know of each other, in one shared mapping (see layout.py).

The supervisor creates it (see backing.py); forked workers inherit the mapping. It survives a SIGKILL of its
writers, and every process that may read its file can read the whole pool from it.

Workers may run as another user than their supervisor, so the supervisor trusts nothing on the scoreboard that could hurt: it keeps its own
record of which worker has which slot, of the generations and of the totals, and only writes them for others to read.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
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
    """One pool's shared memory. Created by create(), private() or join(); call close() when done.

    Three files handle its slots: which worker has which slot (tenants.py), what the workers do (roll.py), and the work that they
    are running (tickets.py).
    """

    def __init__(self, where: Backing, memory: mmap.mmap, supervisor: int = 0) -> None:
        """`supervisor` is this process's pid if it is the supervisor."""
        self.path = where.path
        """The path of its file; None if no folder could hold one: then only the pool itself can read the scoreboard."""
        self._mmap = memory
        self._memory = memoryview(memory)
        self._owner = supervisor
        self._file = Kept(where.file, where.path)
        self._named = None if where.memory == where.file else Kept(where.memory, None)
        """The memory that the file names; processes outside the pool can only read it while its descriptor is open here."""
        self._text = where.text
        self._lock = PoolLock(self._file)
        self.header = Header(self._memory, self._lock)
        self._tenants = tenants = Tenants(self._memory, self.header, partial(_enlarge, self._named or self._file), supervisor)
        self.reserve, self.born, self.release, self.slot = tenants.reserve, tenants.born, tenants.release, tenants.slot
        self.process, self.identity, self.count_recycle = tenants.process, tenants.identity, tenants.count_recycle
        roll = Roll(self._memory, self.header, tenants)
        self.roll, self.marks, self.all_serve, self.others = roll.call, roll.marks, roll.all_serve, roll.others
        self.silent, self.saw, self.give_order, self.quiet_for = roll.silent, roll.saw, roll.give_order, roll.quiet_for
        self.cap, self.pass_on, self.order_probe, self.began_with = roll.cap, roll.pass_on, roll.order_probe, roll.began_with
        self.order_inspection, self.is_ordered_to_be_inspected = roll.order_inspection, roll.is_ordered_to_be_inspected
        tickets = Tickets(self._memory, tenants)
        self.in_hand, self.hand = tickets.in_hand, tickets.hand
        self.tell_of_limit, self.has_heeded = tickets.tell_of_limit, tickets.has_heeded

    @classmethod
    def create(cls, workers: int, server: str) -> tuple[Scoreboard, list[str]]:
        """A new scoreboard of this process's pool, and warnings to log if its file could not be created where it should be.

        It has slots for twice the workers and some more, for replacements and for SIGTTIN, and grows if that is not enough.
        """
        size, header = backing.blank(min(max(32, 2 * workers + 8), layout.SLOTS_MAX), workers, server)
        where, warnings = backing.allocate(size, header, layout.SIZE_MAX)
        return cls(where, mmap.mmap(where.memory, 0), os.getpid()), warnings  # 0: all of it

    @property
    def address(self) -> str:
        """What a spawned process passes to join(): the scoreboard's path, or the name of its memory."""
        return self.path or self._text.decode()

    @property
    def descriptor(self) -> int | None:
        """The descriptor of the shared bytes, for a process that inherits it and reads by Reader.inherited(); None: it was closed."""
        return (self._named or self._file).get()

    @classmethod
    def private(cls, slots: int = 1) -> Scoreboard:
        """A scoreboard that only this process and its forks can read."""
        size, header = backing.blank(slots, slots, "")
        fd = backing.in_memory(size, header, size)
        return cls(Backing(fd, fd, None), mmap.mmap(fd, size), os.getpid())

    @classmethod
    def join(cls, address: str) -> Scoreboard:
        """In a spawned worker: its pool's scoreboard. Raises ScoreboardError if there is none at `address`."""
        return cls(*backing.join(address))

    @staticmethod
    def open(path: str) -> Reader:
        """Another process's scoreboard, for reading. Raises ScoreboardError if there is none at `path`."""
        from oomsafe.scoreboard.reader import Reader  # imported here, because a worker reads only its own scoreboard

        return Reader(path)

    @staticmethod
    def snapshot(path: str) -> PoolView:
        """Read another process's scoreboard once. Raises ScoreboardError if there is none at `path`."""
        with Scoreboard.open(path) as board:
            return board.read()

    @property
    def owner(self) -> int:
        """The supervisor's pid, in the supervisor; else 0."""
        return self._owner

    @property
    def slots(self) -> int:
        """The number of slots; the supervisor adds more when it needs them."""
        return self._tenants.slots

    @property
    def has_room(self) -> bool:
        """Whether there is a slot for one more worker."""
        return self._tenants.has_room

    @property
    def pids(self) -> list[int]:
        """In the supervisor: the pids of the workers that it has started, or that have claimed a slot; some may be dead."""
        return self._tenants.pids

    @property
    def born_processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of the workers that were passed to born(); some may be dead."""
        return self._tenants.born_processes

    @property
    def processes(self) -> list[tuple[int, int]]:
        """(pid, start time) of the workers that were passed to born() and have claimed their slot, for the supervisor to act on."""
        return self._tenants.processes

    def read(self) -> PoolView:
        """The whole pool, as one consistent copy."""
        from oomsafe.scoreboard.view import read_pool  # imported here, because most workers never read the whole pool

        self._tenants.learn()
        if os.getpid() != self._owner:
            return read_pool(self._fetch, self.slots)
        return replace(read_pool(self._fetch, self.slots, self._tenants.identity), supervisor=self._owner)

    def _fetch(self, at: int, length: int) -> bytes:
        return self._memory[at : at + length].tobytes()

    def try_lock(self) -> bool:
        """Take the pool's lock: until unlock(), no other worker or thread can take a turn. The thread that has it may take it again.

        Returns False, without waiting, if another one has it; try again soon.
        """
        return self._lock.try_acquire()

    def unlock(self) -> None:
        """Release the lock. Raises RuntimeError in a thread that does not have it."""
        self._lock.release()

    def mend(self) -> None:
        """In the supervisor, now and then: restore the file if needed, because the application may have closed its descriptor."""
        if self.path is None or os.getpid() != self._owner:
            return
        was_open = self._file.is_open
        file = self._file.get()
        if file is not None and not was_open:
            places.hold(file)
        if file is not None and self._text and os.pread(file, 64, 0) != self._text:  # a worker may have changed it
            os.pwrite(file, self._text, 0)
            os.ftruncate(file, len(self._text))
        if self._named is not None and not self._named.is_open:
            self._named = None
            log.warning("the application has closed the scoreboard's descriptor: `oomsafe status` can't see this pool any more")

    def remove(self) -> None:
        """Remove the file, in the supervisor only; processes that have the mapping keep it."""
        if self.path and os.getpid() == self._owner:
            with suppress(ValueError):  # its memory is closed
                # for who has it open, and can't tell an end in order from a kill otherwise
                self.header.ended = time.time()
            try:
                os.unlink(self.path)
            except OSError:
                pass  # another process has removed it
            self.path = None

    def close(self) -> None:
        """Close the mapping and the descriptors. Slots that were handed out must not be used any more."""
        self._memory.release()
        self._mmap.close()
        for kept in filter(None, (self._file, self._named)):
            kept.close()


def _enlarge(memory: Kept, size: int) -> bool:
    """Enlarge `memory` to `size` bytes, and return whether that succeeded."""
    fd = memory.get()
    if fd is None:
        return False
    try:
        backing.enlarge(fd, size)
    except OSError:
        return False
    return True
