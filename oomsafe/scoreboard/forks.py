"""Objects that belong to one process: a fork of that process leaves them to its parent.

A request may fork, and the child may return through the middleware or into the server's own loop. Anything that it
wrote or decided there would concern its parent. Checking the pid at each request would cost a system call.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from oomsafe.log import failed


class Owned(Protocol):
    """An object that belongs to one process; a fork has a copy that belongs to its parent."""

    def leave(self) -> None:
        """Called in the fork, before anything else runs there: from now on nothing done with this object may reach the parent."""


_owned: weakref.WeakSet[Owned] = weakref.WeakSet()
_watching = False


def own(thing: Owned) -> None:
    """`thing` belongs to this process: leave() is called on its copy in every fork that Python makes, not in forks by C code."""
    global _watching
    _owned.add(thing)
    if not _watching:
        _watching = True
        os.register_at_fork(after_in_child=_leave_all)


def _leave_all() -> None:
    for thing in list(_owned):
        _owned.discard(thing)  # a fork of this fork need not leave it again
        try:
            thing.leave()
        except Exception as error:
            failed("a fork", "the fork", error)
