"""What a forking supervisor has loaded, and how its workers keep sharing it: a shared page is copied when a process writes to it.

Python writes to an object's header when it collects garbage, and to every object when the interpreter
ends. So all objects that exist before a fork are hidden from the collector (gc.freeze), and a worker ends without
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

#: Modules of the standard library whose objects finish writing a file in close(), and call close() when they are collected.
CLOSING = frozenset({"dbm.dumb", "shelve", "tempfile", "wave", "zipfile"})

#: A supervisor that has grown by more than this share, and by more than SHARED_MUCH, has loaded something new at a reload.
LOADED_ANEW = 0.1

#: The base class of all files. Not io.IOBase, which is an abstract class and would remember each class that is checked against it.
_IOBASE: type = io.FileIO.__mro__[-2]
_RAW: type = io.FileIO.__mro__[-3]


class Preload:
    """Created in a supervisor that forks its workers; the workers inherit it."""

    def __init__(self, policy: Policy) -> None:
        self.bytes: int | None = None
        """The bytes that the supervisor had loaded before its first fork, and its workers share; None: too few to matter, or not known."""
        self._policy = policy
        self._begun = False
        self._frozen = False
        self._files: list[weakref.ref[Any]] | None = None

    def before_fork(self) -> None:
        """In the supervisor, before each fork. Before the first one, everything is loaded that the server's and the user's hooks load."""
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
        # without a collection first: it would leave holes in the heap, and a worker that fills a hole copies a page
        freeze()
        self.bytes, self._files, self._frozen = held, files, True
        log.info("%s are preloaded and stay shared with the workers: %d objects are frozen (freeze_preload)", format_size(held), count)

    def after_fork(self) -> None:
        """In the worker: freeze what the supervisor has created since its first fork, so that this stays shared, too."""
        if self.bytes is not None:
            freeze()

    def reloaded(self, policy: Policy) -> None:
        """In the supervisor, at a reload. What the reload has replaced is garbage now, and must become collectable again."""
        self._policy = policy
        if self.bytes is None:
            self._begun = False
            return
        held = anonymous_of(os.getpid()) or 0
        if policy.dry_run or not policy.freeze_preload:
            self.bytes, self._begun = None, False
        elif held > self.bytes + max(SHARED_MUCH, int(self.bytes * LOADED_ANEW)):
            # finding the files that are open now would take a walk of the heap, which would copy everything that old workers share
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
        """In the worker, as its last act before the interpreter's own: have the interpreter end without walking the heap.

        `ending` is the exception that ends the worker; if it is not a SystemExit, the worker ends as it would without us.
        """
        if self.bytes is not None and self._files is not None and isinstance(ending, SystemExit):
            # what is registered last is called first; threads have been joined by then
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
        """Write what open files still hold in their buffers, as the interpreter's end does."""
        standard = [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
        inherited = [file for file in (reference() for reference in self._files or ()) if file is not None]
        # frozen objects are not among these; the newest first, because a file that wraps another was created after it
        own = [*reversed(_files(gc.get_objects()))]
        known = {id(file) for file in standard}
        _each("flush", [file for file in own if isinstance(file, _IOBASE)])
        closing = [file for file in own if id(file) not in known and not _is_buffer(file) and type(file).__module__ != "_io"]
        # raw files last: gzip's (from 3.12) is created after the file that writes through it
        _each("close", sorted(closing, key=lambda file: isinstance(file, _RAW)))
        _each("flush", [file for file in own if _is_buffer(file)])
        _each("flush", [*inherited, *standard])
        _flush_c()


def _status(ending: SystemExit) -> int:
    """The exit status that Python would use for it."""
    code = ending.code
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def _files(objects: list[Any]) -> list[Any]:
    """The objects that are files, or finish one when they are closed. None of their methods is called, because any may be a proxy."""
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, _IOBASE) or _closes(kind)}
    return [one for one in objects if type(one) in kinds]


def _closes(kind: type) -> bool:
    return any(str(cls.__module__) in CLOSING for cls in kind.__mro__) and hasattr(kind, "close")


def _is_buffer(file: Any) -> bool:
    """Whether it is one of io's own classes, which only need a flush; the kernel closes the file."""
    return isinstance(file, (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedReader, io.FileIO))


def _each(method: str, files: Iterable[Any]) -> None:
    for file in files:
        try:
            getattr(file, method)()
        except Exception:
            pass  # it is closed, or its other end is gone; the interpreter would not report more


def _flush_c() -> None:
    """Write what C code has printed (fflush)."""
    try:
        from ctypes import CDLL

        CDLL(None).fflush(None)
    except (ImportError, OSError, AttributeError):
        pass  # without a C library, nothing was printed through it
