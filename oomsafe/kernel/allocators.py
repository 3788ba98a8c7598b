"""What this process's allocators hold, asked of themselves. That takes milliseconds: it is for a worker that ends, or a fork of one."""

from __future__ import annotations

import os
import re
import sys

from oomsafe.kernel.malloc import trim
from oomsafe.kernel.process import Resident, resident_of
from oomsafe.policy.stock import Malloc, Parts, Pymalloc, parts_of, read_pymalloc

#: How CPython's statistics begin.
BEGIN = "Small block threshold"

#: What it prints in any case, and alone where Python's allocator is not used, or has a tracer's hooks: how many objects of a type it keeps.
FREE_LIST = re.compile(r"^ *\d+ (?:free|unused|live) .* bytes each = *[\d,]+\n", re.MULTILINE)

#: The most bytes of statistics that are read: CPython 3.13 prints 5 KiB.
LONGEST = 1 << 18


def take_stock(proc: str = "/proc", parent: Resident | None = None) -> Parts | None:
    """This process's memory by what it is, after malloc has given back what it can. None: its resident memory can't be read.

    `parent`: in a fork that has done nothing yet, what its parent held: then it is the parent's memory, of which nothing is given back. (A
    fork has the same allocators' tables, but the kernel does not copy page tables of files.)

    Takes 1 to 10 ms, more if malloc has many free blocks; call it with no other thread at work, because it redirects stderr for a moment.
    """
    pymalloc, malloc, before = ask_pymalloc(), ask_malloc(), resident_of(proc=proc)
    trim()
    after = resident_of(proc=proc)
    if before is None or after is None:
        return None
    trimmed = None if malloc is None else before.anon - after.anon
    return parts_of(*(parent or before), trimmed, pymalloc, malloc)


def ask_pymalloc() -> Pymalloc | None:
    """What Python's own allocator holds; None: this Python does not say (PyPy), or does without it (PYTHONMALLOC=malloc)."""
    ask = getattr(sys, "_debugmallocstats", None)
    text = "" if ask is None else _printed(ask)
    return read_pymalloc(text)


def ask_malloc() -> Malloc | None:
    """What the C library's malloc holds (mallinfo2, glibc 2.33); None: another library, or an older one."""
    try:
        from ctypes import CDLL, Structure, c_size_t  # imported here: 1 MiB that only a worker that ends pays for

        class Info(Structure):
            _fields_ = [
                (name, c_size_t)
                for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
            ]

        ask = CDLL(None).mallinfo2
        ask.restype = Info
    except (ImportError, OSError, AttributeError):
        return None
    info = ask()
    return Malloc(live=info.uordblks + info.hblkhd, free=info.fordblks)


def _printed(ask: object) -> str:
    """What this function of C code writes to stderr, which it does by the descriptor. What others write meanwhile is passed on."""
    assert callable(ask)
    try:
        caught, stderr = os.memfd_create("oomsafe-stock"), os.dup(2)
    except (OSError, AttributeError):
        return ""
    try:
        os.dup2(caught, 2)
        try:
            ask()
        finally:
            os.dup2(stderr, 2)
        others, begin, text = os.pread(caught, LONGEST, 0).decode("ascii", "replace").partition(BEGIN)
        others = FREE_LIST.sub("", others)
        if others.strip():  # another thread has written a line between the two calls
            os.write(2, others.encode("ascii", "replace"))
        return begin + text
    finally:
        os.close(stderr)
        os.close(caught)
