"""Another process's scoreboard, read from outside. It is never mapped, because truncating a mapped file kills its readers."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING

from oomsafe.errors import ScoreboardError
from oomsafe.scoreboard import backing, layout
from oomsafe.scoreboard.view import PATIENCE, PoolView, read_pool

if TYPE_CHECKING:
    from typing_extensions import Self


class Reader:
    """Raises ScoreboardError if `path` is not a scoreboard of this user, or for root of any user. Call close() when done."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd, self._slots = backing.open_to_read(path)

    @classmethod
    def inherited(cls, fd: int) -> Self:
        """Read through Scoreboard.descriptor, inherited from the supervisor. Raises ScoreboardError if it is not a scoreboard's."""
        reader = cls.__new__(cls)
        reader.path, reader._fd = f"descriptor {fd}", fd
        reader._slots = backing.slots_of(fd, reader.path)
        return reader

    def read(self, patience: float = PATIENCE, *, routes: bool = True) -> PoolView:
        """A consistent copy of the whole pool; after `patience` seconds, it is returned as it is. Raises ScoreboardError.

        Without `routes`, the counters of each route are left out: that is several times as fast.
        """
        slots = layout.IDENTITY.unpack(self._fetch(0, layout.IDENTITY.size))[2]  # the pool may have grown
        there = (min(os.fstat(self._fd).st_size, layout.SIZE_MAX) - layout.HEADER_SIZE) // layout.SLOT_SIZE
        self._slots = max(self._slots, min(slots, there))
        return read_pool(self._fetch, self._slots, patience=patience, routes=routes)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def _fetch(self, at: int, length: int) -> bytes:
        try:
            found = os.pread(self._fd, length, at)
        except OSError as error:
            raise ScoreboardError(f"{self.path}: {error.strerror}") from error
        if len(found) != length:
            raise ScoreboardError(f"{self.path} was cut short")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
