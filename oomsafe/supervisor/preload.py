"""What a forking supervisor has loaded, and how its workers go on sharing it: a page is copied when somebody writes to it.

Python writes to an object's header when it collects garbage, and to each object when the interpreter
ends. So what is there before a fork is taken out of the collector's reach (gc.freeze), and a worker ends without
walking its heap, as multiprocessing's forked children do.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import weakref
from collections.abc import Iterable
from typing import Any

from oomsafe.kernel.heap import freeze, thaw
from oomsafe.kernel.process import anonymous_of
from oomsafe.log import attempt, log
from oomsafe.policy.reclaim import SHARED_MUCH
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import format_size

#: Modules of the standard library whose objects finish a file in close(), and close() when they are collected.
CLOSING = frozenset({"dbm.dumb", "shelve", "tempfile", "wave", "zipfile"})

#: A supervisor that has grown by more than this share, and by SHARED_MUCH, has loaded something new at a reload.
LOADED_ANEW = 0.1

#: What all files have in common. io.IOBase is an abstract class, and would keep a note of each class that it is asked about.
_IOBASE: type = io.FileIO.__mro__[-2]
_RAW: type = io.FileIO.__mro__[-3]


class Preload:
    """Made in a supervisor that forks its workers; they inherit it."""

    def __init__(self, policy: Policy) -> None:
        self.bytes: int | None = None
        """What the supervisor had loaded before its first fork, and its workers share; None: nothing worth keeping, or not known."""
        self._policy = policy
        self._begun = False
        self._frozen = False
        self._files: list[weakref.ref[Any]] | None = None

    def before_fork(self) -> None:
        """In the supervisor, before each fork. At the first everything is loaded that the server's and the user's hooks load."""
        if not self._begun:
            self._begun = True
            self._begin()

    def _begin(self) -> None:
        held = anonymous_of(os.getpid())
        if held is None or held < SHARED_MUCH or self._policy.dry_run:
            return
        if not self._policy.freeze_preload:
            log.info("%s are preloaded, and freeze_preload is off: each worker copies them when it ends", format_size(held))
            return
        objects = gc.get_objects()
        count, files = len(objects), [weakref.ref(file) for file in _files(objects) if _is_buffer(file)]
        del objects
        # without a collection before it: that would leave holes, and a worker that fills a hole copies a page
        freeze()
        self.bytes, self._files, self._frozen = held, files, True
        log.info("%s are preloaded and stay shared with the workers: %d objects are frozen (freeze_preload)", format_size(held), count)

    def after_fork(self) -> None:
        """In the worker: what the supervisor has made since its first fork is shared, too."""
        if self.bytes is not None:
            freeze()

    def reloaded(self, policy: Policy) -> None:
        """In the supervisor, at a reload. What was loaded anew leaves the old for garbage: it must be collectable."""
        self._policy = policy
        if self.bytes is None:
            self._begun = False
            return
        held = anonymous_of(os.getpid()) or 0
        if policy.dry_run or not policy.freeze_preload:
            self.bytes, self._begun = None, False
        elif held > self.bytes + max(SHARED_MUCH, int(self.bytes * LOADED_ANEW)):
            # only a walk, which would copy all that the old workers share, could tell which files are open now
            self.bytes, self._files = held, None
            log.info("%s are preloaded after this reload: they stay shared until a worker ends", format_size(held))
        else:
            return
        self._thaw()

    def _thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            thaw()

    def end_with(self, ending: BaseException | None) -> None:
        """In the worker, as its last act but for what the interpreter does: have that end without walking the heap.

        `ending` is the exception that ends it; for any but a SystemExit it ends as it would without us.
        """
        if self.bytes is not None and self._files is not None and isinstance(ending, SystemExit):
            # registered last, it is called first; threads have been joined by then
            atexit.register(self._end, os.getpid(), _status(ending))

    def _end(self, pid: int, status: int) -> None:
        atexit.unregister(self._end)
        if os.getpid() != pid:
            return
        try:
            atexit._run_exitfuncs()
            attempt("closing files", "the server", self._finish)
        finally:
            os._exit(status)

    def _finish(self) -> None:
        """What the interpreter's end does with open files: what they still hold is written."""
        standard = [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
        inherited = [file for file in (reference() for reference in self._files or ()) if file is not None]
        # what is frozen is not among these; the newest first, for one that wraps another was made after it
        own = [*reversed(_files(gc.get_objects()))]
        known = {id(file) for file in standard}
        _each("flush", [file for file in own if isinstance(file, _IOBASE)])
        closing = [file for file in own if id(file) not in known and not _is_buffer(file) and type(file).__module__ != "_io"]
        # a raw one last: gzip's (from 3.12) is made after the file whose writes go through it
        _each("close", sorted(closing, key=lambda file: isinstance(file, _RAW)))
        _each("flush", [file for file in own if _is_buffer(file)])
        _each("flush", [*inherited, *standard])
        _flush_c()


def _status(ending: SystemExit) -> int:
    """The exit status that Python would have made of it."""
    code = ending.code
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def _files(objects: list[Any]) -> list[Any]:
    """Those that are files, or finish one when they are closed. Nothing of theirs is called: a proxy's class may be any."""
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, _IOBASE) or _closes(kind)}
    return [one for one in objects if type(one) in kinds]


def _closes(kind: type) -> bool:
    return any(str(cls.__module__) in CLOSING for cls in kind.__mro__) and hasattr(kind, "close")


def _is_buffer(file: Any) -> bool:
    """Whether it is one of io's own, for which a flush is all; the kernel closes it."""
    return isinstance(file, (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedReader, io.FileIO))


def _each(method: str, files: Iterable[Any]) -> None:
    for file in files:
        try:
            getattr(file, method)()
        except Exception:
            pass  # it is closed, or its other end is gone: the interpreter would not say more


def _flush_c() -> None:
    """What C code has printed."""
    try:
        from ctypes import CDLL

        CDLL(None).fflush(None)
    except (ImportError, OSError, AttributeError):
        pass  # no such library: nothing of the kind has printed
