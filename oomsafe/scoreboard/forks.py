"""What belongs to one process alone: a fork of it is told to leave it to its parent.

A request may fork, and the child may come back through the middleware or into the server's own loop. Whatever it would
write there, or decide, would be about its parent. To ask for the pid at each request would cost a system call.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from oomsafe.log import failed


class Owned(Protocol):
    """Something of which a fork has a copy that is not its own."""

    def leave(self) -> None:
        """In the fork, before anything else runs there: from now on nothing that is done with it reaches the parent."""


_owned: weakref.WeakSet[Owned] = weakref.WeakSet()
_watching = False


def own(thing: Owned) -> None:
    """`thing` is this process's: leave() is called on its copy in every fork that Python makes; C code's can't be seen."""
    global _watching
    _owned.add(thing)
    if not _watching:
        _watching = True
        os.register_at_fork(after_in_child=_leave_all)


def _leave_all() -> None:
    for thing in list(_owned):
        _owned.discard(thing)  # a fork of the fork has nothing more to leave
        try:
            thing.leave()
        except Exception as error:
            failed("a fork", "the fork", error)
